// Loads and stores: checked for bounds, alignment, races and uninitialized values, and counted.
#include <stdlib.h>
#include "executor.h"

#define COUNT(WHICH) m->launch->counters[(i - m->launch->code) * COUNTERS + WHICH]

static Watched *find(Machine *m, const Instruction *i, u64 address, int bytes) {
  int *last = m->last_tensor + (i - m->launch->code);
  for (int tries = -1; tries < m->launch->n_tensors; tries++) {
    Watched *t = m->watched + (tries < 0 ? *last : tries);
    u64 begin = address - t->tensor.base;
    if (begin < t->tensor.bytes && begin + bytes <= t->tensor.bytes) return *last = t - m->watched, t;
  }
  return NULL;
}

// A lane of a dependent launch that has not waited stores nothing, since the launch before may still read what was
// there, and loads nothing that this launch stores to.
static void depend(Machine *m, Warp *w, const Instruction *i, u64 address, int bytes, int store, int lane) {
  const Launch *l = m->launch;
  if (!l->dependent || w->depended >> lane & 1) return;
  if (store) fault(m, "line %d: a store before the wait for the launch before", i->line);
  for (int k = 0; k < l->n_unfinished && !store; k++)
    if (address < l->unfinished[k].base + l->unfinished[k].bytes && address + bytes > l->unfinished[k].base)
      fault(m, "line %d: a load before the wait for the launch before, which stores there", i->line);
}

// Whether the stamped access happened before what this warp does now.
static int before(const Stamp *s, const Cta *c, const Warp *w) {
  if (s->cta == ~0u) return 1;
  if (s->cta == c->id) return s->warp == w->index || s->epoch < c->epoch;
  int position = c->position[s->cta] - 1;
  if (position < 0) return 0;
  if (c->since[position] == c->epoch && c->acquirer[position] != w->index) return 0;
  const Stamp *known = c->known.list + position;
  if (s->epoch != known->epoch) return s->epoch < known->epoch;
  return s->warp == known->warp && s->released <= known->released;
}

// Whether all programs have passed a barrier since any of them read it, and this warp knows.
static int after_all_reads(Machine *m, const Granule *g, const Cta *c, const Warp *w) {
  for (int k = 0; k < m->launch->programs; k++) {
    Stamp read = {m->launch->chosen[k], g->last_epoch, 0, SOME_WARPS};
    if (!before(&read, c, w)) return 0;
  }
  return 1;
}

// Warps of one CTA may store the same values without a barrier, and all may load what one of them then updates.
static void race(Machine *m, const Instruction *i, const Stamp *s, const Cta *c, const char *kind, u64 granule, int replica) {
  if (s->cta != c->id)
    fault(m, "line %d: %s race in global memory with program %u, element %llu", i->line, kind, s->cta, granule);
  else if (replica)
    m->launch->totals[REPLICAS]++;
  else
    fault(m, "line %d: %s race in global memory with another warp, element %llu", i->line, kind, granule);
}

// same: it is a store of what is there already.
static void touch(Machine *m, Cta *c, Warp *w, const Instruction *i, Watched *t, u64 address, int bytes, int store, int same, int atomic) {
  if (!t->granules) {
    if (store && t->tensor.kind == READ_ONLY) fault(m, "line %d: a store to an input", i->line);
    return;
  }
  Stamp now = {c->id, c->epoch, w->released, w->index};
  u64 first = (address - t->tensor.base) >> t->tensor.granule;
  u64 last = (address - t->tensor.base + bytes - 1) >> t->tensor.granule;
  int replica = same || t->tensor.kind == UPDATED;
  t->stores += store;
  for (u64 k = first; k <= last; k++) {
    Granule *g = t->granules + k;
    if (!(g->by_atomic && atomic) && !before(&g->wrote, c, w))
      race(m, i, &g->wrote, c, store ? "write-write" : "write-read", k, replica);
    if (store) {
      if (g->read_by_many && !after_all_reads(m, g, c, w))
        fault(m, "line %d: a store over what several programs load, element %llu", i->line, k);
      if (!before(&g->read, c, w)) race(m, i, &g->read, c, "read-write", k, replica);
      *g = (Granule){now, NOBODY, 0, 1, atomic, 0};
      continue;
    }
    if (!g->stored && !t->early_load) t->early_load = i->line;
    if (g->read.cta != ~0u && g->read.cta != c->id && !before(&g->read, c, w)) g->read_by_many = 1;
    if (g->read.cta == c->id && g->read.epoch == c->epoch && g->read.warp != w->index) now.warp = SOME_WARPS;
    if (g->read_by_many && t->tensor.kind == UPDATED && after_all_reads(m, g, c, w)) g->read_by_many = g->last_epoch = 0;
    if (now.epoch > g->last_epoch) g->last_epoch = now.epoch;
    g->read = now;
    now.warp = w->index;
  }
}

// Counts what an access of a lane moves. What other lanes and warps of the program have moved by the same
// instruction counts once, and so does a sector that one line of the source moves by several instructions. Returns
// whether any byte has been moved by the same instruction.
static int count_moved(Machine *m, Cta *c, Warp *w, Watched *t, u64 address, int bytes, int store) {
  i64 *moved = t->tensor.moved + store;
  u64 offset = address - t->tensor.base, sector = (address >> 5) - (t->tensor.base >> 5);
  int granule = 1 << t->tensor.granule, again = 0;
  u32 pc = w->last - m->launch->code;
  Mark now = {c->id + 1, pc << 16 | (w->times[pc] & 0xffff)}, *s = t->sectors[store] + sector;
  for (u64 k = offset >> t->tensor.granule; k <= (offset + bytes - 1) >> t->tensor.granule; k++) {
    Mark *g = t->marks[store] + k;
    int same = !memcmp(g, &now, sizeof now);
    if (!same) moved[LOADED] += bytes < granule ? bytes : granule;
    *g = now, again |= same;
    t->tensor.touched[k] |= 1 << store;
  }
  now.number = w->operations;
  moved[LOADED_SECTORS] += memcmp(s, &now, sizeof now) != 0;
  moved[NEW_LOADED_SECTORS] += s->cta == 0;
  *s = now;
  return again;
}

void global_access(Machine *m, Cta *c, Warp *w, const Instruction *i, u32 active, int store) {
  int bytes = i->size * i->count, found = 0, lanes = __builtin_popcount(active);
  u64 sectors[LANES];
  w->operations += !w->last || i <= w->last || i->place != w->last->place;
  w->times[i - m->launch->code]++, w->last = i;
  EACH_LANE if (active >> lane & 1) {
    u64 address = w->registers[i->from[0]].lane[lane] + i->offset;
    if (address % bytes) { fault(m, "line %d: a misaligned access of %d bytes", i->line, bytes); continue; }
    Watched *t = find(m, i, address, bytes);
    if (!t) { fault(m, "line %d: out of bounds: lane %d, address %llx", i->line, lane, address); continue; }
    depend(m, w, i, address, bytes, store, lane);
    int same = store;
    for (int k = 0; k < i->count && same; k++)
      same = !memcmp((void *)(address + k * i->size), &w->registers[i->to[k]].lane[lane], i->size);
    touch(m, c, w, i, t, address, bytes, store, same, 0);
    int again = t->marks[0] && count_moved(m, c, w, t, address, bytes, store);
    for (int k = 0; k < i->count; k++) {
      u64 value = store ? w->registers[i->to[k]].lane[lane] : 0;
      void *at = (void *)(address + k * i->size);
      if (store && again && memcmp(at, &value, i->size))
        fault(m, "line %d: lanes store different values at address %llx", i->line, address);
      memcpy(store ? at : &value, store ? &value : at, i->size);
      if (!store && i->to[k] >= 0) w->registers[i->to[k]].lane[lane] = value;
    }
    int k = found - 1;
    if (k < 0 || sectors[k] != address >> 5)
      for (k = 0; k < found && sectors[k] != address >> 5; k++);
    if (k == found) {
      u64 *cached = c->cached + (address >> 5) % m->launch->cached;
      sectors[found++] = address >> 5;
      COUNT(FETCHED) += store || *cached != address >> 5;
      if (!store) *cached = address >> 5;
    }
  }
  COUNT(SECTORS) += found;
  COUNT(FEWEST_SECTORS) += (lanes * bytes + 31) / 32;
}

// A wavefront serves each of 32 banks once. Accesses of 8 and 16 bytes a lane take a half and a quarter of the
// lanes at a time.
static void count_wavefronts(Machine *m, const Instruction *i, const u32 *addresses, u32 active, int bytes) {
  int together = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  for (int first = 0; first < LANES; first += together) {
    u32 words[32][LANES];
    int different[32] = {0}, most = 0, any = 0;
    for (int lane = first; lane < first + together; lane++) {
      if (!(active >> lane & 1)) continue;
      any = 1;
      for (u32 word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; word++) {
        int bank = word % 32, k = 0;
        while (k < different[bank] && words[bank][k] != word) k++;
        if (k == different[bank]) words[bank][different[bank]++] = word;
        if (different[bank] > most) most = different[bank];
      }
    }
    COUNT(WAVEFRONTS) += most;
    COUNT(FEWEST_WAVEFRONTS) += any;
  }
}

static int shared_ok(Machine *m, const Instruction *i, u64 address, int bytes) {
  if (address + bytes > (u64)m->launch->shared_bytes)
    return fault(m, "line %d: out of bounds in shared memory: %llu", i->line, address), 0;
  if (address % bytes) return fault(m, "line %d: a misaligned access of shared memory", i->line), 0;
  return 1;
}

// Threads of different warps are ordered by barriers only, those of one warp by bar.warp.sync too. A store of
// the value that another thread has stored since the last barrier is no race: warps may hold the same values.
static void touch_shared(Machine *m, Cta *c, Warp *w, const Instruction *i, u32 address, int bytes, int lane, int store, int same) {
  u32 thread = w->index * LANES + lane, now = w->epoch + 1;
  if (m->launch->racing) return;
  for (u32 k = address; k < address + bytes; k += m->launch->shared_step) {
    Byte *b = c->bytes + k;
    int wrote = b->wrote_in == now && b->wrote_by != thread && !(store && same);
    int read = store && b->read_in == now && (b->read_by != thread || b->read_by_many) && !(same && b->wrote_in == now);
    int one_warp = b->wrote_by / LANES == (u32)w->index;
    if (one_warp) wrote &= b->wrote_synced == w->synced;
    if (wrote) fault(m, "line %d: %s race in shared memory, byte %u", i->line, store ? "write-write" : "write-read", k);
    one_warp = b->read_by / LANES == (u32)w->index && !b->read_by_many;
    if (one_warp) read &= b->read_synced == w->synced;
    if (read) fault(m, "line %d: read-write race in shared memory, byte %u", i->line, k);
    if (store) {
      b->wrote_in = now, b->wrote_by = thread, b->wrote_synced = w->synced;
      continue;
    }
    if (!b->wrote_in) fault(m, "line %d: a load of uninitialized shared memory, byte %u", i->line, k);
    // of several readers in one warp any one stands for all; of several warps, the flag does
    b->read_by_many = b->read_in == now && (b->read_by_many || b->read_by / LANES != (u32)w->index);
    b->read_in = now, b->read_by = thread, b->read_synced = w->synced;
  }
}

void shared_access(Machine *m, Cta *c, Warp *w, const Instruction *i, u32 active, int store) {
  int bytes = i->size * i->count;
  u32 addresses[LANES];
  EACH_LANE addresses[lane] = (u32)(w->registers[i->from[0]].lane[lane] + i->offset);
  count_wavefronts(m, i, addresses, active, bytes);
  EACH_LANE if (active >> lane & 1 && shared_ok(m, i, addresses[lane], bytes)) {
    for (int k = 0; k < i->count; k++) {
      u8 *at = c->shared + addresses[lane] + k * i->size;
      u64 value = store ? w->registers[i->to[k]].lane[lane] : 0;
      int same = store && !memcmp(at, &value, i->size);
      touch_shared(m, c, w, i, addresses[lane] + k * i->size, i->size, lane, store, same);
      memcpy(store ? (void *)at : &value, store ? &value : (void *)at, i->size);
      if (!store && i->to[k] >= 0) w->registers[i->to[k]].lane[lane] = value;
    }
  }
}

// ldmatrix and stmatrix: 1, 2 or 4 matrices of 8 x 8 elements of 2 bytes. Lane 8 j + r has the address of row r
// of matrix j; lane 4 r + p holds elements 2 p and 2 p + 1 of this row, or of this column if transposed.
void matrix_access(Machine *m, Cta *c, Warp *w, const Instruction *i, u32 active, int store) {
  u32 addresses[LANES], rows = i->count == 4 ? ~0u : (1u << 8 * i->count) - 1;
  if (active != ~0u) fault(m, "line %d: a matrix access in a diverged warp", i->line);
  EACH_LANE addresses[lane] = (u32)(w->registers[i->from[0]].lane[lane] + i->offset);
  count_wavefronts(m, i, addresses, rows, 16);
  EACH_LANE if (rows >> lane & 1 && !shared_ok(m, i, addresses[lane], 16)) return;
  for (int j = 0; j < i->count; j++) EACH_LANE for (int half = 0; half < 2; half++) {
    int row = lane / 4, column = lane % 4 * 2 + half;
    u32 address = addresses[8 * j + (i->flag ? column : row)] + 2 * (i->flag ? row : column);
    u64 *value = &w->registers[i->to[j]].lane[lane];
    u16 element = (u16)(*value >> 16 * half);
    touch_shared(m, c, w, i, address, 2, lane, store, store && !memcmp(c->shared + address, &element, 2));
    if (store) {
      memcpy(c->shared + address, &element, 2);
    } else {
      memcpy(&element, c->shared + address, 2);
      *value = half ? (*value & 0xffff) | (u32)element << 16 : element;
    }
  }
}

static void learn(Cta *c, Warp *w, const Stamp *s) {
  if (s->cta == c->id) return;
  Knowledge *known = &c->known;
  int position = c->position[s->cta] - 1;
  if (position >= 0) {
    const Stamp *old = known->list + position;
    if (old->epoch > s->epoch || (old->epoch == s->epoch && old->released >= s->released)) return;
  } else {
    if (known->length == known->room) {
      known->room = 2 * known->room + 16;
      known->list = realloc(known->list, known->room * sizeof(Stamp));
      c->since = realloc(c->since, known->room * sizeof(u32));
      c->acquirer = realloc(c->acquirer, known->room);
    }
    position = known->length++;
    c->position[s->cta] = position + 1;
  }
  known->list[position] = *s;
  c->since[position] = c->epoch, c->acquirer[position] = w->index;
}

// What a program knows travels with the atomics that acquire and release: `released` is what those on this
// address have made known.
void atomic_add(Machine *m, Cta *c, Warp *w, const Instruction *i, u32 active) {
  EACH_LANE if (active >> lane & 1) {
    u64 address = w->registers[i->from[0]].lane[lane] + i->offset;
    Watched *t = find(m, i, address, 4);
    if (!t || t->tensor.kind == READ_ONLY) { fault(m, "line %d: an atomic out of bounds", i->line); continue; }
    if (address % 4) { fault(m, "line %d: a misaligned atomic", i->line); continue; }
    depend(m, w, i, address, 4, 1, lane);
    u64 k = (address - t->tensor.base) >> t->tensor.granule;
    t->tensor.touched[k] |= 1 << LOADED | 1 << STORED;
    if (!t->released) t->released = calloc((t->tensor.bytes >> t->tensor.granule) + 1, sizeof(Knowledge *));
    Knowledge *released = t->released[k];
    if (!released) released = t->released[k] = calloc(1, sizeof(Knowledge));
    if (i->flag) for (int n = 0; n < released->length; n++) learn(c, w, released->list + n);
    touch(m, c, w, i, t, address, 4, 1, 0, 1);
    u32 *counter = (u32 *)address, old = *counter;
    *counter = old + (u32)w->registers[i->from[1]].lane[lane];
    if (i->to[0] >= 0) w->registers[i->to[0]].lane[lane] = old;
    if (!i->flag) continue;
    int n = 0;
    released->list = realloc(released->list, (c->known.length + 1) * sizeof(Stamp));
    for (int p = 0; p < c->known.length; p++)
      if (c->since[p] < c->epoch || c->acquirer[p] == w->index) released->list[n++] = c->known.list[p];
    released->list[n++] = (Stamp){c->id, c->epoch, w->released, w->index};
    released->length = n;
    w->released++;
  }
}

Watched *watch(const Launch *launch) {
  Watched *all = calloc(launch->n_tensors + 1, sizeof(Watched));
  for (int k = 0; k < launch->n_tensors; k++) {
    all[k].tensor = launch->tensors[k];
    u64 n = (all[k].tensor.bytes >> all[k].tensor.granule) + 1;
    for (int store = 0; store < 2 && launch->counting; store++) {
      all[k].marks[store] = calloc(n, sizeof(Mark));
      all[k].sectors[store] = calloc(all[k].tensor.bytes / 32 + 2, sizeof(Mark));
    }
    if (all[k].tensor.kind == READ_ONLY || all[k].tensor.kind == UNWATCHED) continue;
    all[k].granules = calloc(n, sizeof(Granule));
    for (u64 g = 0; g < n; g++) all[k].granules[g].wrote = all[k].granules[g].read = NOBODY;
  }
  return all;
}

void unwatch(Machine *m) {
  for (int k = 0; k < m->launch->n_tensors; k++) {
    Watched *t = m->watched + k;
    if (t->tensor.kind == MADE && t->stores && t->early_load)
      fault(m, "line %d: a load of uninitialized memory, tensor %d", t->early_load, k);
    if (t->released)
      for (u64 g = 0; g < (t->tensor.bytes >> t->tensor.granule) + 1; g++)
        if (t->released[g]) free(t->released[g]->list), free(t->released[g]);
    memcpy(m->launch->tensors[k].moved, t->tensor.moved, sizeof t->tensor.moved);
    free(t->released), free(t->granules);
    for (int store = 0; store < 2; store++) free(t->marks[store]), free(t->sectors[store]);
  }
  free(m->watched);
}
