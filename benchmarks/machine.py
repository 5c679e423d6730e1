"""What the GPU itself can do, whatever runs on it: the copy rate that a kernel's time is held against, and
what a launch costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import timing
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.timing import (
    ROUNDS,
    Spread,
    Stopwatch,
    Timed,
    Work,
    in_turn,
    on_gpu,
    on_host,
    repeated,
    rotation,
)  # fmt: skip

SIZES = (2**30, 2**29, 2**28)  # bytes of a buffer: beyond any L2, so that memory's own rate is told
TILE = 4096  # values a program; each thread of its four warps moves 16 bytes at a time
FEWEST_CALLS = 8  # timed together, so that what the events cost is lost among them
FEW, MANY = 16, 144  # launches: queued within the stopwatch's head start
OPTIONS = {"enable_fp_fusion": True}  # without, Triton 3.9 warns that its default will change
NO_ROOM = "its buffers need more than a quarter of the free memory"
Copy = Callable[[Tensor, Tensor], object]  # source, destination


@triton.jit
def copy_kernel(x_ptr: tl.tensor, y_ptr: tl.tensor, n: tl.tensor, TILE: tl.constexpr) -> None:
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def empty_kernel(x_ptr: tl.tensor) -> None:
    pass


def copy(source: Tensor, destination: Tensor) -> None:
    """Contiguous fp32 tensors of fewer than 2**31 values."""
    programs = triton.cdiv(source.numel(), TILE)
    copy_kernel[(programs,)](source, destination, source.numel(), TILE=TILE, **OPTIONS)


def empty(x: Tensor, programs: int) -> None:
    """Launches what does nothing."""
    empty_kernel[(programs,)](x, **OPTIONS)


WAYS: dict[str, Copy] = {"Tensor.copy_": lambda source, to: to.copy_(source), "copy_kernel": copy}


def copies(
    device: torch.device, stopwatch: Stopwatch = on_gpu, sizes: Sequence[int] | None = None,
    ways: dict[str, Copy] = WAYS, rounds: int = ROUNDS, memory: int | None = None,
) -> Iterator[Record]:  # fmt: skip
    """A line for each size and way. GBps counts what is read and what is written. Buffers take turns, so that
    COLD_BYTES lie between two uses of one; all of them take at most a quarter of the free memory.

    memory: bytes that are free; asked for if None."""
    free = torch.cuda.mem_get_info(device)[0] if memory is None else memory
    for size in SIZES if sizes is None else sizes:
        count, text = rotation(size), f"{size >> 20} MiB"
        if 2 * size * count > free // 4:
            yield Record("copy", CANNOT, "copy", shape=text, note=NO_ROOM)
            continue
        # random, since zeros draw less power, and so run at a higher clock
        pairs = [[torch.randn(size // 4, device=device) for _ in range(2)] for _ in range(count)]
        order = pairs * -(-FEWEST_CALLS // count)

        def work(way: Copy, order: list[list[Tensor]] = order) -> None:
            for source, destination in order:
                way(source, destination)

        todo = {name: Timed(partial(work, way), len(order)) for name, way in ways.items()}
        for name, samples in in_turn(todo, stopwatch, rounds).items():
            time = Spread.of(samples)
            yield Record(
                "copy", MEASURED, "copy", name, shape=text, dtype="fp32", cache="cold", mode="eager",
                floor_bytes=2 * size, GBps=2 * size / time.us / 1e3, **time.columns(),
            )  # fmt: skip


def copy_rate(lines: Sequence[Record]) -> float:
    """The yardstick, of `copies`: GB/s, read and written ones together. Of each way to copy the median over
    the sizes; of these the best. RuntimeError if none could be measured."""
    ways = {line.ran for line in lines if line.GBps}
    if not ways:
        raise RuntimeError(
            f"no copy could be measured: {lines[0].note if lines else 'no size was asked for'}"
        )
    return max(statistics.median(line.GBps or 0 for line in lines if line.ran == way) for way in ways)


def in_graph(work: Work) -> Work:
    """`work` as a CUDA graph: what it launches is launched again by one call."""
    work()  # compiles, which a capture does not allow
    graph, _ = timing.captured(work)
    return graph.replay


def launches(
    device: torch.device, stopwatch: Stopwatch = on_gpu, host: Stopwatch = on_host,
    launch: Callable[[Tensor, int], None] = empty, rounds: int = ROUNDS,
) -> Iterator[Record]:  # fmt: skip
    """Lines for an empty kernel of one program, and of one for each SM: from one launch to the next on the
    GPU, on a stream and in a CUDA graph, as the difference of many and few in the same round, so that what
    timing costs cancels out; and the host's own time for a launch (in the line's `host_us`)."""
    x = torch.zeros(16, device=device)
    for programs in (1, torch.cuda.get_device_properties(device).multi_processor_count):
        shape = f"grid of {programs}"
        works = {("eager", n): repeated(partial(launch, x, programs), n) for n in (FEW, MANY)}
        works |= {("graph", count): in_graph(work) for (_, count), work in works.items()}
        samples = in_turn({name: Timed(work) for name, work in works.items()}, stopwatch, rounds)
        for mode in ("eager", "graph"):
            both = zip(samples[mode, FEW], samples[mode, MANY], strict=True)
            time = Spread.of([(more - less) / (MANY - FEW) for less, more in both])
            note = "from one empty kernel to the next, its own run included"
            yield Record("probe", MEASURED, "launch gap", shape=shape, mode=mode, note=note, **time.columns())
    todo = {0: Timed(repeated(partial(launch, x, 1), MANY), MANY)}
    time = Spread.of(in_turn(todo, host, rounds)[0])
    yield Record(
        "probe", MEASURED, "launch, host", shape="grid of 1", mode="eager", host_us=round(time.us, 3),
        note=f"quartiles of host_us: {time.us_low:.2f} and {time.us_high:.2f}",
    )  # fmt: skip
