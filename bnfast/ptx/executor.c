// Executes one launch of a kernel that Triton has compiled to PTX: CTAs of warps of 32 lanes, in a random
// interleaving. Lanes of a warp may diverge; they meet again where an instruction needs them all.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include "executor.h"

enum {
#define OP(NAME, SPELLINGS, RESULT) OP_##NAME,
#include "opcodes.h"
#undef OP
  BRANCH, EXIT, BARRIER, WARP_SYNC, PARAMETER, LOAD, STORE, LOAD_SHARED, STORE_SHARED, LOAD_MATRIX, STORE_MATRIX,
  ATOMIC_ADD, SHUFFLE_XOR, SHUFFLE_INDEX, REDUCE_ADD, UNPACK16, UNPACK32,
  GRID_WAIT, GRID_SIGNAL,
};

#define MOST_FAULTS 12
#define MOST_STEPS (1ll << 28)  // of the average program

void fault(Machine *m, const char *format, ...) {
  if (m->faults++ >= MOST_FAULTS) return;
  size_t used = strlen(m->launch->messages);
  if (used + 2 >= (size_t)m->launch->messages_room) return;
  va_list values;
  va_start(values, format);
  vsnprintf(m->launch->messages + used, m->launch->messages_room - used - 1, format, values);
  va_end(values);
  strcat(m->launch->messages, "\n");
}

// The bits of an approximate result: if asked, moved by at most so many units in the last place, always the same
// way for the same operands.
static inline u32 near(Machine *m, float result, u64 operands, int exact, int most) {
  if (!m->perturb || exact || result == 0 || !isfinite(result)) return fbits(result);
  u64 state = ((operands & 0xffffffff) << 32 | fbits(result)) + m->perturb;
  i32 size = (i32)(fbits(result) & 0x7fffffff) + (i32)(random_bits(&state) % (2 * most + 1)) - most;
  if (size < 0 || size > 0x7f7fffff) return fbits(result);  // it stays finite
  return (u32)size | (fbits(result) & 0x80000000u);
}

// The same for an error that is documented as a share of the result.
static inline u32 near_share(Machine *m, double result, u64 operands, double share) {
  u32 rounded = fbits((float)result), moved = near(m, (float)result, operands, 0, 2);
  return fabs((double)F(moved) - result) <= share * result ? moved : rounded;
}

static int needs_all_lanes(i32 op) {
  return op == BARRIER || op == WARP_SYNC || op == SHUFFLE_XOR || op == SHUFFLE_INDEX || op == REDUCE_ADD || op == LOAD_MATRIX || op == STORE_MATRIX;
}

// The lanes that run next: those that are furthest behind, unless they wait for others. 0: all wait.
static u32 choose_lanes(const Launch *launch, Warp *w, i32 *pc) {
  if (w->together) return *pc = w->pc[0], w->alive;
  for (u32 blocked = 0;;) {
    u32 chosen = 0;
    *pc = INT32_MAX;
    EACH_LANE if ((w->alive & ~blocked) >> lane & 1 && w->pc[lane] < *pc) *pc = w->pc[lane];
    if (*pc == INT32_MAX) return 0;
    EACH_LANE if (w->alive >> lane & 1 && w->pc[lane] == *pc) chosen |= 1u << lane;
    if (chosen == w->alive || !needs_all_lanes(launch->code[*pc].op)) {
      w->together = chosen == ~0u;
      return chosen;
    }
    blocked |= chosen;
  }
}

static void go_to(Warp *w, u32 lanes, i32 pc) {
  if (!lanes) return;
  if (w->together && lanes == ~0u) { w->pc[0] = pc; return; }
  if (w->together) EACH_LANE w->pc[lane] = w->pc[0];
  w->together = 0;
  EACH_LANE if (lanes >> lane & 1) w->pc[lane] = pc;
}

// A warp issues in order: an instruction waits for what its sources load. `round` counts these waits, as far as
// they follow from each other.
static void wait_for_sources(Warp *w, const Instruction *i) {
  if (i->guard >= 0 && w->ready[i->guard >> 1] > w->round) w->round = w->ready[i->guard >> 1];
  int stores = i->op == STORE || i->op == STORE_SHARED || i->op == STORE_MATRIX;
  for (int k = 0; k < 8; k++) {
    if (i->from[k] >= 0 && w->ready[i->from[k]] > w->round) w->round = w->ready[i->from[k]];
    if (stores && i->to[k] >= 0 && w->ready[i->to[k]] > w->round) w->round = w->ready[i->to[k]];
  }
}

#define A (r[from[0]].lane[lane])
#define B (r[from[1]].lane[lane])
#define C (r[from[2]].lane[lane])
#define RESULT (r[to[0]].lane[lane])

// Runs some instructions of a warp, up to a barrier at most.
static void run_warp(Machine *m, Cta *c, Warp *w, int instructions) {
  Register *r = w->registers;
  if (m->steps > MOST_STEPS * m->launch->programs) fault(m, "a program that does not end"), m->faults = MOST_FAULTS;
  while (instructions-- > 0 && m->faults < MOST_FAULTS) {
    i32 pc;
    u32 here = choose_lanes(m->launch, w, &pc), active = here;
    if (!here) { fault(m, "lanes of a warp wait for each other"); return; }
    const Instruction *i = m->launch->code + pc;
    const i32 *to = i->to, *from = i->from;
    i64 *counters = m->launch->counters + (i64)pc * COUNTERS;
    m->steps++, counters[EXECUTED]++;
    wait_for_sources(w, i);
    if (i->guard >= 0) {
      u32 wanted = 0;
      EACH_LANE wanted |= (u32)((r[i->guard >> 1].lane[lane] ^ i->guard) & 1) << lane;
      active &= wanted;
    }
    if (i->op == BRANCH) {
      counters[DIVERGED] += active && active != here;
      go_to(w, here & ~active, pc + 1);
      go_to(w, active, i->target);
      continue;
    }
    if (i->op == EXIT) {
      go_to(w, here, pc + 1);
      if (m->launch->dependent && active & ~w->depended)
        fault(m, "line %d: program %u ends without having waited for the launch before it", i->line, c->id);
      w->alive &= ~active;
      if (!w->alive) { w->done = 1, c->exited++; return; }
      if (active) EACH_LANE w->pc[lane] = w->together ? w->pc[0] : w->pc[lane];
      if (active) w->together = 0;
      continue;
    }
    go_to(w, here, pc + 1);
    switch (i->op) {
#define OP(NAME, SPELLINGS, VALUE)                              \
  case OP_##NAME:                                               \
    if (active == ~0u) EACH_LANE RESULT = (VALUE);              \
    else EACH_LANE if (active >> lane & 1) RESULT = (VALUE);    \
    break;
#include "opcodes.h"
#undef OP
      case BARRIER:
        if (!active) break;
        if (active != ~0u) fault(m, "line %d: a barrier in a diverged warp", i->line);
        w->waiting = 1, c->waiting++;
        return;
      case WARP_SYNC: w->synced++; break;
      case PARAMETER: EACH_LANE if (active >> lane & 1) RESULT = i->size == 4 ? (u32)m->launch->parameters[i->offset] : m->launch->parameters[i->offset]; break;
      case LOAD:
      case STORE:
        global_access(m, c, w, i, active, i->op == STORE);
        if (i->op == LOAD && active)
          for (int k = 0; k < i->count; k++)
            if (to[k] >= 0) w->ready[to[k]] = w->round + 1;
        break;
      case LOAD_SHARED:
      case STORE_SHARED: shared_access(m, c, w, i, active, i->op == STORE_SHARED); break;
      case LOAD_MATRIX:
      case STORE_MATRIX: matrix_access(m, c, w, i, active, i->op == STORE_MATRIX); break;
      case ATOMIC_ADD:
        atomic_add(m, c, w, i, active);
        if (active && to[0] >= 0) w->ready[to[0]] = w->round + 1;
        if (active && !w->final_round) w->final_round = w->round + 1;
        break;
      case SHUFFLE_XOR:
      case SHUFFLE_INDEX: {
        u64 given[LANES];
        if (active != ~0u) fault(m, "line %d: a shuffle in a diverged warp", i->line);
        EACH_LANE given[lane] = A;
        EACH_LANE RESULT = given[i->op == SHUFFLE_XOR ? (lane ^ B) & 31 : B & 31];
        break;
      }
      case REDUCE_ADD: {
        u32 sum = 0, masks = ~0u;
        EACH_LANE sum += (u32)A, masks &= (u32)B;
        if ((active & masks) != ~0u) fault(m, "line %d: a reduction of a part of a warp", i->line);
        EACH_LANE RESULT = sum;
        break;
      }
      case UNPACK16:
      case UNPACK32: EACH_LANE if (active >> lane & 1) {
        u64 x = A;
        if (to[0] >= 0) r[to[0]].lane[lane] = i->op == UNPACK16 ? (u16)x : (u32)x;
        if (to[1] >= 0) r[to[1]].lane[lane] = i->op == UNPACK16 ? (u16)(x >> 16) : x >> 32;
      } break;
      case GRID_WAIT: w->depended |= active; break;
      case GRID_SIGNAL: break;  // a hint: what waits, waits until this launch has ended
      default: fault(m, "line %d: no such instruction: %d", i->line, i->op); return;
    }
  }
}

static void start(Machine *m, Cta *c, u32 id) {
  const Launch *l = m->launch;
  if (!c->warps) {
    c->warps = calloc(l->warps, sizeof(Warp));
    c->shared = malloc(l->shared_bytes + 16);
    c->bytes = malloc((l->shared_bytes + 16) * sizeof(Byte));
    c->position = calloc(l->grid, sizeof(i32));
    c->cached = m->cached ? NULL : malloc(l->cached * sizeof(u64));
    for (int k = 0; k < l->warps; k++) {
      c->warps[k].registers = aligned_alloc(64, l->registers * sizeof(Register));
      c->warps[k].ready = malloc(l->registers * sizeof(u32));
      c->warps[k].times = malloc(l->length * sizeof(u32));
    }
  }
  memset(c->shared, 0xdb, l->shared_bytes);  // as a value: far from all others
  memset(c->bytes, 0, (l->shared_bytes + 16) * sizeof(Byte));
  if (m->cached) c->cached = m->cached + (i64)(id % l->sms) * l->cached;
  else memset(c->cached, 0xff, l->cached * sizeof(u64));
  for (int k = 0; k < c->known.length; k++) c->position[c->known.list[k].cta] = 0;
  c->id = id, c->epoch = 0, c->live = 1, c->waiting = c->exited = c->known.length = 0;
  for (int k = 0; k < l->warps; k++) {
    Warp *w = c->warps + k;
    Register *registers = w->registers;
    u32 *ready = w->ready, *times = w->times;
    *w = (Warp){.alive = ~0u, .index = k, .together = 1, .registers = registers, .ready = ready, .times = times};
    memcpy(registers, l->initial, l->registers * sizeof(Register));
    memset(ready, 0, l->registers * sizeof(u32));
    memset(times, 0, l->length * sizeof(u32));
    // %tid.x, %ctaid.x, .y and .z, %nctaid.x, .y and .z
    u32 x = l->grid_x, y = l->grid_y, special[] = {0, id % x, id / x % y, id / x / y, x, y, l->grid / x / y};
    EACH_LANE registers[0].lane[lane] = k * LANES + lane;
    for (int n = 1; n < 7; n++) EACH_LANE registers[n].lane[lane] = special[n];
  }
}

static void pass_barrier(Machine *m, Cta *c) {
  u32 round = 0, final_round = 0;
  if (c->exited) fault(m, "a barrier that %d warps of program %u have not reached", c->exited, c->id);
  for (int k = 0; k < m->launch->warps; k++) {
    if (c->warps[k].round > round) round = c->warps[k].round;
    if (c->warps[k].final_round > final_round) final_round = c->warps[k].final_round;
  }
  c->waiting = 0, c->epoch++;
  for (int k = 0; k < m->launch->warps; k++) {
    Warp *w = c->warps + k;
    w->waiting = 0, w->epoch = c->epoch, w->released = 0, w->round = round, w->final_round = final_round;
  }
}

static void finish(Machine *m, Cta *c) {
  i64 *totals = m->launch->totals;
  if (c->epoch > totals[BARRIERS]) totals[BARRIERS] = c->epoch;
  for (int k = 0; k < m->launch->warps; k++) {
    Warp *w = c->warps + k;
    if (w->round > totals[ROUND_TRIPS]) totals[ROUND_TRIPS] = w->round;
    if (w->final_round && w->round - w->final_round > totals[FINAL_ROUND_TRIPS])
      totals[FINAL_ROUND_TRIPS] = w->round - w->final_round;
  }
  c->live = 0;
}

// Returns the number of instructions executed, of warps. What is wrong is in launch->messages.
i64 execute(const Launch *launch) {
  Machine machine = {.launch = launch, .random = launch->seed, .perturb = launch->perturb}, *m = &machine;
  m->watched = watch(launch), m->last_tensor = calloc(launch->length, sizeof(int));
  Cta *ctas = calloc(launch->resident, sizeof(Cta));
  u32 *order = malloc(launch->programs * sizeof(u32));
  int next = 0, live = 0;
  if (launch->sms) {
    size_t size = (size_t)launch->sms * launch->cached * sizeof(u64);
    m->cached = memset(malloc(size), 0xff, size);
  }
  for (int k = 0; k < launch->programs; k++) order[k] = launch->chosen[k];
  for (int k = launch->programs - 1; launch->seed && k > 0; k--) {
    int other = random_bits(&m->random) % (k + 1);
    u32 kept = order[k];
    order[k] = order[other], order[other] = kept;
  }
  for (;;) {
    for (int k = 0; k < launch->resident && next < launch->programs; k++)
      if (!ctas[k].live) start(m, ctas + k, order[next++]), live++;
    if (!live || m->faults >= MOST_FAULTS) break;
    Cta *c = ctas + random_bits(&m->random) % launch->resident;
    while (!c->live) c = ctas + (c - ctas + 1) % launch->resident;
    int k = random_bits(&m->random) % launch->warps, tries = 0;
    while (tries < launch->warps && (c->warps[k].waiting || c->warps[k].done)) k = (k + 1) % launch->warps, tries++;
    if (tries < launch->warps) run_warp(m, c, c->warps + k, 1 + random_bits(&m->random) % launch->quantum);
    if (c->waiting && c->waiting + c->exited == launch->warps) pass_barrier(m, c);
    if (c->exited == launch->warps) finish(m, c), live--;
  }
  for (int k = 0; k < launch->resident; k++) {
    for (int n = 0; ctas[k].warps && n < launch->warps; n++) {
      Warp *w = ctas[k].warps + n;
      free(w->registers), free(w->ready), free(w->times);
    }
    free(ctas[k].warps), free(ctas[k].shared), free(ctas[k].bytes), free(ctas[k].position);
    if (!m->cached) free(ctas[k].cached);
    free(ctas[k].known.list), free(ctas[k].since), free(ctas[k].acquirer);
  }
  unwatch(m);
  free(ctas), free(order), free(m->last_tensor), free(m->cached);
  return m->steps;
}
