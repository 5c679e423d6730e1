"""Small kernels, most of them wrong on purpose: each instrument is tested on what it has to catch.

They run interpreted or are compiled, according to TRITON_INTERPRET at the time of the import.
"""

import triton
import triton.language as tl

from bnfast.kernels.moments import product


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr, STRIDE: tl.constexpr = 1, FAULT: tl.constexpr = ""):
    """y = x[::STRIDE], which fetches STRIDE times the sectors it needs. FAULT: "overrun", of both tensors
    when n is no multiple of BLOCK; "half", where the upper half of y is never written."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i >= 0 if FAULT == "overrun" else i < n
    tl.store(y + i, tl.load(x + i * STRIDE, mask=mask), mask=i < n // 2 if FAULT == "half" else mask)


@triton.jit
def centre_in_registers(x, y, BLOCK: tl.constexpr):
    """Keeps a whole tile for its second step: spills when BLOCK is too large for the CTA."""
    i = tl.arange(0, BLOCK)
    tile = tl.load(x + i).to(tl.float32)
    tl.store(y + i, tile - tl.sum(tile, 0) / BLOCK)


@triton.jit
def store_colliding(y, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """So many lanes of one store meet on every element, and so do all programs."""
    tl.store(y + tl.arange(0, BLOCK) // LANES, tl.arange(0, BLOCK) + tl.program_id(0))


@triton.jit
def advance_step(step, y):
    """Program 0 moves a counter on that the other programs may still have to read."""
    seen = tl.load(step)
    tl.store(y + tl.program_id(0), seen)
    if tl.program_id(0) == 0:
        tl.store(step, seen + 1)


@triton.jit
def sum_last_done(
    x, partials, counter, y, rows, BLOCK: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr
):
    """Column sums of x; the last program to arrive merges the partials. A race without BARRIER or acq_rel."""
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(pid * rows, (pid + 1) * rows):
        total += tl.load(x + tl.cast(row, tl.int64) * BLOCK + i).to(tl.float32)
    tl.store(partials + pid * BLOCK + i, total)
    if BARRIER:
        tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem=SEM, scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        merged = tl.zeros((BLOCK,), tl.float32)
        for p in tl.range(0, tl.num_programs(0)):
            merged += tl.load(partials + p * BLOCK + i, cache_modifier=".cg")
        tl.store(y + i, merged)
        tl.store(counter, 0)


@triton.jit
def number_arrivals(counter, y):
    """Which program gets which number depends on the order in which they run."""
    tl.store(y + tl.program_id(0), tl.atomic_add(counter, 1))


@triton.jit
def sum_rows(x, y, rows, BLOCK: tl.constexpr, UNROLL: tl.constexpr = 1, PARTS: tl.constexpr = 0):
    """One tile of x a row, UNROLL rows an iteration. PARTS: each part of the sums is added up in turn."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(0, rows, UNROLL, num_stages=1):
        tile = tl.load(x + tl.cast(row, tl.int64) * BLOCK + tl.arange(0, UNROLL * BLOCK))
        total += tl.sum(tl.reshape(tile, (UNROLL, BLOCK)).to(tl.float32), 0)
    if PARTS == 0:
        tl.store(y + i, total)
    else:
        for part in tl.range(0, PARTS):
            tl.store(y + part, tl.sum(tl.where(i // (BLOCK // PARTS) == part, total, 0.0), 0))


@triton.jit
def dot(x, y, sum, BLOCK: tl.constexpr, ROUNDED: tl.constexpr):
    """sum = x . y. Unless ROUNDED, two lanes that add up the same values may differ in the last bit."""
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    products = product(a, b) if ROUNDED else a * b
    tl.store(sum + tl.arange(0, 1), tl.sum(products[None, :], 1))
