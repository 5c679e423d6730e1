// What the parts of the executor share. Races are found between warps, as all lanes of one are in step.
#include "values.h"

#define LANES 32
#define EACH_LANE for (int lane = 0; lane < LANES; lane++)
#define SOME_WARPS 0xff  // in a Stamp: more than one warp of the CTA

// program.py and execute.py have the same layouts, as numpy dtypes and ctypes structures.
typedef struct {
  i32 op, guard;       // guard: 2 * the predicate's register, + 1 if it is negated; -1: none
  i32 to[8], from[8];  // registers; -1: the value is dropped
  i64 offset;          // added to an address; of ld.param, which parameter
  i32 size, count;     // of an access: bytes of an element, elements
  i32 flag;            // of a matrix: transposed; of an atomic: acquires and releases
  i32 compare, target, line;
  i32 place;           // of a global access: which of the source's; those of one tl.load are at one
} Instruction;

typedef struct {
  u64 base, bytes;
  i32 granule;  // log2 of the bytes that are watched together: those of an element
  i32 kind;     // what the kernel may do with it, as below
  u8 *touched;  // of each granule: 1 << LOADED, 1 << STORED
  i64 moved[6];
} Tensor;
// MADE: nothing may be loaded that this launch has not stored. UNWATCHED: anything goes, within its bounds.
enum { READ_ONLY, MADE, UPDATED, UNWATCHED };

// Of `moved`; the first two are bytes, the last two sectors that the launch had not loaded or stored before.
enum { LOADED, STORED, LOADED_SECTORS, STORED_SECTORS, NEW_LOADED_SECTORS, NEW_STORED_SECTORS };

// FETCHED: sectors that are asked of L2: all that are stored, and those loaded that L1 lacks.
enum { EXECUTED, SECTORS, FEWEST_SECTORS, FETCHED, WAVEFRONTS, FEWEST_WAVEFRONTS, DIVERGED, COUNTERS };
enum { REPLICAS, ROUND_TRIPS, FINAL_ROUND_TRIPS, BARRIERS, TOTALS };

// When a warp of a CTA did something: how many barriers the CTA had passed, and how many atomics the warp had
// released since.
typedef struct { u32 cta, epoch, released; u8 warp; } Stamp;
#define NOBODY ((Stamp){.cta = ~0u})

typedef struct {
  Stamp wrote, read;
  u32 last_epoch;  // in which a program has read it
  u8 stored, by_atomic, read_by_many;
} Granule;

typedef struct { Stamp *list; int length, room; } Knowledge;  // the newest known stamp of other CTAs

// Which CTA, + 1, was the last to move something, and when: by which instruction, and the how manieth time.
typedef struct { u32 cta, number; } Mark;

typedef struct {
  Tensor tensor;
  Mark *marks[2], *sectors[2];  // of each granule and of each sector: by loads, by stores
  Granule *granules;     // NULL of a tensor that is only read or not watched
  Knowledge **released;  // of each granule that an atomic has released
  i64 stores;
  int early_load;        // the line that loaded uninitialized memory; 0: none did
} Watched;

typedef struct { u64 lane[LANES]; } Register;

typedef struct { u64 base, bytes; } Span;

typedef struct {
  i32 pc[LANES];  // pc[0] is all lanes' while `together`
  u32 alive, depended;  // depended: lanes that have waited for the launch before
  int index, together, waiting, done;
  u32 epoch, synced, released, round, final_round;  // round: global round trips that its results depend on
  u32 operations;  // of global memory, as the source has them
  u32 *times;      // of each instruction: how often it has accessed global memory
  const Instruction *last;
  Register *registers;
  u32 *ready;     // of each register: the round in which its value arrives
} Warp;

typedef struct { u32 wrote_in, wrote_by, read_in, read_by, wrote_synced, read_synced; int read_by_many; } Byte;

typedef struct {
  u32 id, epoch;
  int live, waiting, exited;
  u64 *cached;  // of L1, the number of a sector in the one place that this gives it
  u8 *shared;
  Byte *bytes;
  Warp *warps;
  Knowledge known;
  i32 *position;   // of each CTA in `known`, + 1; 0: nothing is known
  u32 *since;      // of each entry: 2 * the epoch in which it was acquired
  u8 *acquirer;    // and the warp that did so
} Cta;

typedef struct {
  const Instruction *code;
  i32 length, registers, warps, shared_bytes, shared_step, grid, resident, quantum;
  i32 grid_x, grid_y;   // of the grid, whose third size follows
  i32 programs;         // how many of the grid are executed: `chosen`
  i32 cached, sms;      // sectors of an L1, and how many take programs in turn; 0: each program has one
  i32 counting;         // whether what is moved of each tensor is counted
  i32 racing;           // whether races in shared memory go unwatched
  i32 dependent;        // whether it may start before the launch before it has ended
  i32 n_unfinished;
  const i32 *chosen;
  const Register *initial;
  const u64 *parameters;
  const Span *unfinished;  // of a dependent launch: the tensors that launches which may still run have stored to
  Tensor *tensors;
  i32 n_tensors, messages_room;
  u64 seed, perturb;  // perturb: moves approximate results within their documented error; 0: does not
  i64 *counters;      // COUNTERS of each instruction
  i64 *totals;
  char *messages;
} Launch;

typedef struct {
  const Launch *launch;
  Watched *watched;
  int *last_tensor;  // of each instruction: where it found its last address
  u64 *cached;       // the L1s of `sms`
  u64 random, perturb;
  int faults;
  i64 steps;
} Machine;

void fault(Machine *m, const char *format, ...);
void global_access(Machine *m, Cta *c, Warp *w, const Instruction *i, u32 active, int store);
void shared_access(Machine *m, Cta *c, Warp *w, const Instruction *i, u32 active, int store);
void matrix_access(Machine *m, Cta *c, Warp *w, const Instruction *i, u32 active, int store);
void atomic_add(Machine *m, Cta *c, Warp *w, const Instruction *i, u32 active);
Watched *watch(const Launch *launch);
void unwatch(Machine *m);
