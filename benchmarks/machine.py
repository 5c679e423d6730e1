"""What the GPU itself can do: the copy rate that a kernel's time is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import timing
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.timing import ROUNDS, Spread, Stopwatch, Timed, in_turn, on_gpu

SIZE = 2**30  # bytes of a buffer, or less where memory is short
TILE = 4096  # values a program; each thread of its four warps moves 16 bytes at a time
CALLS = 8  # timed together, so that what the events cost is lost among them
NO_ROOM = "buffers larger than L2 need more than a quarter of the free memory"
Copy = Callable[[Tensor, Tensor], object]  # source, destination


@triton.jit
def copy_kernel(x_ptr: tl.tensor, y_ptr: tl.tensor, n: tl.tensor, TILE: tl.constexpr) -> None:
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


def copy(source: Tensor, destination: Tensor) -> None:
    """Contiguous fp32 tensors of fewer than 2**31 values."""
    programs = triton.cdiv(source.numel(), TILE)
    # without the last, Triton 3.9 warns that its default will change
    copy_kernel[(programs,)](source, destination, source.numel(), TILE=TILE, enable_fp_fusion=True)


WAYS: dict[str, Copy] = {"Tensor.copy_": lambda source, to: to.copy_(source), "copy_kernel": copy}


def copies(
    device: torch.device, stopwatch: Stopwatch = on_gpu, ways: dict[str, Copy] = WAYS, rounds: int = ROUNDS
) -> Iterator[Record]:
    """A line for each way to copy. GBps counts what is read and what is written. Two pairs of buffers take
    turns, which take at most a quarter of the free memory, and each is too large to be found in L2 again."""
    size = min(SIZE, torch.cuda.mem_get_info(device)[0] // 16) // 16 * 16
    if size < timing.COLD_BYTES:
        yield Record("copy", CANNOT, "copy", note=NO_ROOM)
        return
    # random, since zeros draw less power, and so run at a higher clock
    pairs = [[torch.randn(size // 4, device=device) for _ in range(2)] for _ in range(2)]

    def work(way: Copy) -> None:
        for source, destination in pairs * (CALLS // 2):
            way(source, destination)

    todo = {name: Timed(partial(work, way), CALLS) for name, way in ways.items()}
    for name, samples in in_turn(todo, stopwatch, rounds).items():
        time = Spread.of(samples)
        yield Record(
            "copy", MEASURED, "copy", name, shape=f"{size >> 20} MiB", dtype="fp32", cache="cold",
            mode="eager", floor_bytes=2 * size, GBps=2 * size / time.us / 1e3, **time.columns(),
        )  # fmt: skip


def copy_rate(lines: Sequence[Record]) -> float:
    """The yardstick, of `copies`: GB/s, read and written ones together, of the best way to copy. RuntimeError
    if none could be measured."""
    if not any(line.GBps for line in lines):
        raise RuntimeError(f"no copy could be measured: {lines[0].note}")
    return max(line.GBps or 0 for line in lines)
