"""What a kernel costs beyond its work: the gap between two launches, the host's time, a barrier of the grid.

Each is a difference between many and few in the same round, so that what timing itself costs cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import graphs
from benchmarks.machine import kernels
from benchmarks.machine.facts import Facts, facts
from benchmarks.machine.lines import OUT_OF_TIME, cannot
from benchmarks.records import MEASURED, Record
from benchmarks.stopwatch import ROUNDS, Budget, Spread, Stopwatch, Timed, in_turn, on_gpu, on_host

FEW, MANY = 16, 144  # launches: queued within the stopwatch's head start
FEW_BARRIERS, MANY_BARRIERS = 16, 272

Work = Callable[[], None]


def captured(work: Work) -> Work:
    """`work` as a CUDA graph: what it launches is launched again by one call."""
    work()  # compiles, which a capture does not allow
    graph, _ = graphs.captured(work)
    return graph.replay


def repeated(launch: Work, count: int) -> Work:
    def work() -> None:
        for _ in range(count):
            launch()

    return work


def of_one(samples: Mapping[int, Sequence[float]]) -> Spread:
    """Of one launch, or one barrier: `samples` are of few and of many of them, in the same rounds."""
    (few, less), (many, more) = sorted(samples.items())
    return Spread.of([(high - low) / (many - few) for low, high in zip(less, more, strict=True)])


def programs_text(programs: int) -> str:
    return f"{programs} program{'s' * (programs != 1)}"


def launches(
    device: torch.device, seconds: float, stopwatch: Stopwatch = on_gpu, *,
    host: Stopwatch = on_host, capture: Callable[[Work], Work] = captured,
    launch: Callable[[Tensor, int], None] = kernels.empty, rounds: int = ROUNDS, found: Facts | None = None,
) -> Iterator[Record]:  # fmt: skip
    """Lines for an empty kernel of one program, and of one for each SM: from one launch to the next on the
    GPU, on a stream and in a CUDA graph; and the host's own time for a launch (in the line's `host_us`).

    host: times the host. capture: makes a graph. found: see bandwidth."""
    budget, found = Budget(seconds), found or facts(device)
    x = kernels.randoms(16, device)
    grids = (1, found.processors)
    for number, programs in enumerate(grids):
        share = budget.share(len(grids) + 1 - number)
        shape = programs_text(programs)
        if share is None:
            yield cannot("launch gap", shape, OUT_OF_TIME)
            continue
        once = partial(launch, x, programs)
        works = {("eager", count): repeated(once, count) for count in (FEW, MANY)}
        works |= {("graph", count): capture(work) for (_, count), work in works.items()}
        samples = in_turn({name: Timed(work) for name, work in works.items()}, stopwatch, share, rounds)
        for mode in ("eager", "graph"):
            spread = of_one({count: samples[mode, count] for count in (FEW, MANY)})
            yield Record(
                "probe", MEASURED, "launch gap", "empty_kernel", shape=shape, mode=mode, **vars(spread),
                note="from one empty kernel to the next, its own run included",
            )  # fmt: skip
    share = budget.share(1)
    if share is None:
        yield cannot("launch, host", programs_text(1), OUT_OF_TIME)
        return
    todo = {"host": Timed(repeated(partial(launch, x, 1), MANY), MANY)}
    spread = Spread.of(in_turn(todo, host, share, rounds)["host"])
    yield Record(
        "probe", MEASURED, "launch, host", "empty_kernel", shape=programs_text(1), mode="eager",
        host_us=spread.us, rounds=spread.rounds,
        note=f"quartiles of host_us: {spread.us_low:.2f} and {spread.us_high:.2f}",
    )  # fmt: skip


def grid_barriers(
    device: torch.device, seconds: float, stopwatch: Stopwatch = on_gpu, *,
    meet: Callable[[Tensor, Tensor, int], None] = kernels.meet, rounds: int = ROUNDS,
    found: Facts | None = None,
) -> Iterator[Record]:  # fmt: skip
    """A line for each number of programs, up to one an SM: the time of one barrier of the whole grid. More
    programs might not all be on the GPU at once, and would wait for each other in vain.

    meet: launches programs that meet, called as kernels.meet is. found: see bandwidth."""
    budget, found = Budget(seconds), found or facts(device)
    grids = sorted({found.processors, max(1, found.processors // 2), min(2, found.processors)}, reverse=True)
    arrivals = torch.zeros(1, dtype=torch.int32, device=device)
    for number, programs in enumerate(grids):
        share = budget.share(len(grids) - number)
        shape = programs_text(programs)
        if share is None:
            yield cannot("grid barrier", shape, OUT_OF_TIME)
            continue
        missed = torch.zeros(programs, dtype=torch.int32, device=device)
        timed = {
            count: Timed(partial(meet, arrivals, missed, count), prepare=arrivals.zero_)
            for count in (FEW_BARRIERS, MANY_BARRIERS)
        }
        spread = of_one(in_turn(timed, stopwatch, share, rounds))
        if missed.any():
            yield cannot("grid barrier", shape, f"{missed.sum()} times a program waited for others in vain")
            continue
        yield Record(
            "probe", MEASURED, "grid barrier", "barrier_kernel", shape=shape, mode="eager", **vars(spread),
            note="of one barrier among many",
        )  # fmt: skip
