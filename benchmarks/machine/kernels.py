"""Kernels that do nothing but move bytes, launch, or wait for each other, and the functions that launch them.

Buffers are contiguous fp32 tensors, of fewer than 2**31 values. A program takes one tile. Each thread of its
four warps moves 16 bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = (4096, 2048, 1024)  # values: what a program takes of a large buffer; less where SMs would be idle
SMALLEST = 512  # 16 bytes a thread
PROGRAMS_A_PROCESSOR = 8
FACTOR = -1640531527  # 2**32 over the golden ratio, as int32
OPTIONS = {"enable_fp_fusion": True}  # without, Triton 3.9 warns that its default will change
PATIENCE = 1 << 20  # looks at the counter of a barrier before a program gives up: about a second


@triton.jit
def copy_kernel(x_ptr: tl.tensor, y_ptr: tl.tensor, n: tl.tensor, TILE: tl.constexpr) -> None:
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def read_kernel(
    x_ptr: tl.tensor, sums_ptr: tl.tensor, n: tl.tensor, TILE: tl.constexpr, REVERSE: tl.constexpr
) -> None:
    """The sum of each tile. REVERSE: programs, which start in the order of their numbers, take the last tile
    first."""
    tile = tl.program_id(0)
    if REVERSE:
        tile = tl.num_programs(0) - 1 - tile
    offs = tile * TILE + tl.arange(0, TILE)
    tl.store(sums_ptr + tile, tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0), 0))


@triton.jit
def write_kernel(y_ptr: tl.tensor, n: tl.tensor, FACTOR: tl.constexpr, TILE: tl.constexpr) -> None:
    """y[i] = i * FACTOR, wrapped around as int32: numbers that look random and cost two instructions."""
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y_ptr + offs, (offs * FACTOR).to(tl.float32), mask=offs < n)


@triton.jit
def empty_kernel(x_ptr: tl.tensor) -> None:
    pass


@triton.jit
def barrier_kernel(
    arrivals_ptr: tl.tensor, missed_ptr: tl.tensor,
    programs: tl.tensor, barriers: tl.tensor, patience: tl.tensor,
) -> None:  # fmt: skip
    """All programs meet at one barrier after another: a program arrives by adding 1 to the counter, which
    must be 0 at launch, and goes on once all have. A program that has looked `patience` times in vain waits
    no more, at this barrier or later ones. missed[program] grows by the barriers it did not pass."""
    looks = 0
    missed = 0
    for number in range(barriers):
        expected = (number + 1) * programs
        tl.debug_barrier()  # every thread's work before the one thread's atomic
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") + 1
        while (arrived < expected) & (looks < patience):
            arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire", scope="gpu")
            looks += 1
        missed += (arrived < expected).to(tl.int32)
    own_ptr = missed_ptr + tl.program_id(0)
    tl.store(own_ptr, tl.load(own_ptr) + missed)


def tile_of(values: int, processors: int) -> int:
    """The largest tile that still has several programs for every SM."""
    fitting = (tile for tile in TILES if values >= tile * processors * PROGRAMS_A_PROCESSOR)
    return next(fitting, SMALLEST)


def copy(source: Tensor, destination: Tensor, processors: int) -> None:
    """destination = source."""
    n = source.numel()
    tile = tile_of(n, processors)
    copy_kernel[(triton.cdiv(n, tile),)](source, destination, n, TILE=tile, **OPTIONS)


def read(source: Tensor, sums: Tensor, processors: int, reverse: bool = False) -> None:
    """sums[i] = the sum of the i-th tile of source; there are ceil(numel / tile_of) of them."""
    n = source.numel()
    tile = tile_of(n, processors)
    read_kernel[(triton.cdiv(n, tile),)](source, sums, n, TILE=tile, REVERSE=reverse, **OPTIONS)


def write(destination: Tensor, processors: int) -> None:
    """destination[i] = i * FACTOR, wrapped around as int32."""
    n = destination.numel()
    tile = tile_of(n, processors)
    write_kernel[(triton.cdiv(n, tile),)](destination, n, FACTOR=FACTOR, TILE=tile, **OPTIONS)


def randoms(values: int, device: torch.device) -> Tensor:
    """A buffer of normal random numbers: zeros draw less power, and so run at a higher clock."""
    return torch.randn(values, device=device)


def empty(x: Tensor, programs: int) -> None:
    """Launches what does nothing."""
    empty_kernel[(programs,)](x, **OPTIONS)


def meet(arrivals: Tensor, missed: Tensor, barriers: int) -> None:
    """missed.numel() programs meet so many times. Both int32: arrivals [1], 0; missed, see barrier_kernel."""
    programs = missed.numel()
    barrier_kernel[(programs,)](arrivals, missed, programs, barriers, PATIENCE, **OPTIONS)
