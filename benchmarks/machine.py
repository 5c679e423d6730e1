"""What the GPU itself can do, whatever runs on it: the copy rate that a kernel's time is held against, and
what a launch costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import timing
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.timing import ROUNDS, Spread, Stopwatch, Timed, Work, in_turn, on_gpu, on_host, repeated

SIZE = 2**30  # bytes of a buffer, or less where memory is short
TILE = 4096  # values a program; each thread of its four warps moves 16 bytes at a time
CALLS = 8  # timed together, so that what the events cost is lost among them
FEW, MANY = 16, 144  # launches: queued within the stopwatch's head start
OPTIONS = {"enable_fp_fusion": True}  # without, Triton 3.9 warns that its default will change
NO_ROOM = "buffers larger than L2 need more than a quarter of the free memory"
GAP = "from one empty kernel to the next, its own run included"
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
        works = {("eager", n): repeated(partial(launch, x, programs), n) for n in (FEW, MANY)}
        works |= {("graph", count): in_graph(work) for (_, count), work in works.items()}
        samples = in_turn({name: Timed(work) for name, work in works.items()}, stopwatch, rounds)
        for mode in ("eager", "graph"):
            both = zip(samples[mode, FEW], samples[mode, MANY], strict=True)
            time = Spread.of([(more - less) / (MANY - FEW) for less, more in both])
            shape = f"grid of {programs}"
            yield Record("probe", MEASURED, "launch gap", shape=shape, mode=mode, note=GAP, **time.columns())
    todo = {0: Timed(repeated(partial(launch, x, 1), MANY), MANY)}
    time = Spread.of(in_turn(todo, host, rounds)[0])
    note = f"quartiles of host_us: {time.us_low:.2f} and {time.us_high:.2f}"
    yield Record(
        "probe", MEASURED, "launch, host", shape="grid of 1", mode="eager", host_us=time.us, note=note
    )
