"""Time on a GPU's own clock or the host's, several things in turn, and what is made of the readings."""

from __future__ import annotations

import contextlib
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

COLD_BYTES = 256 * 2**20  # between two uses of a buffer: four times the L2 of an H200
HEAD_START = 10_000_000  # GPU cycles, about 5 ms: longer than the host takes to queue what is timed together
ROUNDS = 20
WARM_UP = 2  # rounds left out: the first one compiles, the second finds caches and allocator as later ones do

T = TypeVar("T")
Name = TypeVar("Name")
Work = Callable[[], object]
Stopwatch = Callable[[Work], float]  # runs what it is given, returns microseconds


def is_gpu(device: torch.device) -> bool:
    """Asked for in one place, where tests make up a GPU."""
    return device.type == "cuda"


def host_microseconds(call: Work, calls: int) -> float:
    """Microseconds that one of so many calls takes, after as many that may compile."""
    _, seconds = timeit.repeat(call, number=calls, repeat=2)
    return seconds / calls * 1e6


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, in microseconds, of so many rounds."""

    us: float
    us_low: float
    us_high: float
    rounds: int

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Of one or more."""
        low, middle, high = (float(np.quantile(samples, share)) for share in (0.25, 0.5, 0.75))
        return Spread(middle, low, high, len(samples))

    def columns(self) -> dict[str, Any]:
        """As a Record has them."""
        return {name: round(value, 3) for name, value in vars(self).items()}


class Late(float):
    """Microseconds that may be the host's: the GPU was done with waiting before all work was queued."""


def on_gpu(work: Work) -> float:
    """From one event to another. The GPU is kept busy while `work` is queued, so that it never waits for a
    launch: what is read is its own time, not the host's. Late where that did not do."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    start.record()
    work()
    late = start.query()
    end.record()
    end.synchronize()
    elapsed = float(start.elapsed_time(end)) * 1e3
    return Late(elapsed) if late else elapsed


def lateness(samples: Sequence[float]) -> str:
    """A remark for the reader of a table; empty where all is well."""
    late = sum(isinstance(sample, Late) for sample in samples)
    return f"{late} of {len(samples)} readings may be the host's time" if late else ""


def on_host(work: Work) -> float:
    """Until `work` returns: on a GPU, which is idle at the start, the time to launch; on a CPU to compute."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def nothing() -> None:
    pass


def evicting(device: torch.device) -> Work:
    """Reads COLD_BYTES of its own, after which a cache holds nothing else."""
    return torch.ones(max(1, COLD_BYTES // 4), device=device).sum


@dataclass(frozen=True)
class Timed:
    """`work` does something `calls` times. prepare: runs before each time it is timed; clean: after it. They
    are not timed."""

    work: Work
    calls: int = 1
    prepare: Work = nothing
    clean: Work = nothing


def in_turn(
    all_timed: Mapping[Name, Timed], stopwatch: Stopwatch, rounds: int = ROUNDS
) -> dict[Name, list[float]]:
    """Microseconds of one call, a sample each round. All are timed once in every round, so that a clock that
    changes is the same for all, every other round in reverse order."""
    samples: dict[Name, list[float]] = {name: [] for name in all_timed}
    for number in range(rounds + WARM_UP):
        order = list(all_timed.items())
        for name, timed in reversed(order) if number % 2 else order:
            timed.prepare()
            elapsed = stopwatch(timed.work)
            timed.clean()
            if number >= WARM_UP:
                samples[name].append(type(elapsed)(elapsed / timed.calls))
    return samples


def repeated(work: Work, count: int) -> Work:
    def several() -> None:
        for _ in range(count):
            work()

    return several


def captured(work: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `work`, which has run before, and what it returned. pool: memory to share with others.

    What `work` raises comes as it is, and leaves the current stream what it was. torch does neither: an error
    of its own at the end of a failed capture hides the reason, and leaves the capture's stream current."""
    graph, reasons = torch.cuda.CUDAGraph(), list[Exception]()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            try:
                return graph, work()
            except Exception as error:
                reasons.append(error)
                raise
    except Exception as error:
        raise (reasons.pop() if reasons else error) from None


def on_a_side_stream(work: Work) -> None:
    """As a capture wants what it captures to have run."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        work()
    current.wait_stream(side)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """On a CPU: small tensors gain nothing by more, and on a busy machine threads that wait for one another
    take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_line(e: BaseException) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]
