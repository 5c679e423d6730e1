"""How fast bytes are copied, read and written, by the size of the buffer.

Cold: buffers take turns, so that four times the L2 lies between two uses of one. A write counts as done once
L2 has it, so small writes may be faster than memory: only sizes well beyond the L2 tell memory's own rate.
Warm: the same buffers again and again. Calls follow each other without a pause, and their time includes the
gap between them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.machine import kernels
from benchmarks.machine.facts import Facts, facts
from benchmarks.machine.lines import NO_ROOM, OUT_OF_TIME, cannot, moving, size_text
from benchmarks.records import Record
from benchmarks.stopwatch import ROUNDS, Budget, Spread, Stopwatch, Timed, in_turn, on_gpu, rotation

SIZES = tuple(2**power for power in range(30, 15, -1))  # 1 GiB to 64 KiB: memory's own rate comes first
LARGE = tuple(size for size in SIZES if size >= 2**28)  # beyond any L2
# timed together: so few that the host queues them within the stopwatch's head start, and so many that what
# its events cost is lost among them
FEWEST_CALLS, MOST_CALLS = 8, 64
COLD = 4  # times the L2

Pair = tuple[Tensor, Tensor]  # source, destination


@dataclass(frozen=True)
class Way:
    """One way to move a buffer. moves: bytes of traffic a byte of the buffer. run: takes source, destination,
    and the number of SMs."""

    kind: str
    name: str
    ran: str
    moves: int
    run: Callable[[Tensor, Tensor, int], object]


COPIES = (
    Way("copy", "copy, torch", "Tensor.copy_", 2, lambda source, to, processors: to.copy_(source)),
    Way("copy", "copy, kernel", "copy_kernel", 2, kernels.copy),
)
WAYS = (
    *COPIES,
    Way("probe", "read", "read_kernel", 1, kernels.read),
    Way("probe", "write", "write_kernel", 1, lambda source, to, processors: kernels.write(to, processors)),
)


class Ring:
    """Pairs of buffers that are taken in turn, by all ways."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs, self._next = pairs, 0
        self.calls = min(max(len(pairs), FEWEST_CALLS), MOST_CALLS)
        self.taken: list[Pair] = []

    def turn(self) -> None:
        self.taken = [self._pairs[(self._next + i) % len(self._pairs)] for i in range(self.calls)]
        self._next = (self._next + self.calls) % len(self._pairs)


def cold(way: Way, ring: Ring, processors: int) -> Timed:
    def work() -> None:
        for source, destination in ring.taken:
            way.run(source, destination, processors)

    return Timed(work, ring.calls, ring.turn)


def warm(way: Way, pair: Pair, processors: int) -> Timed:
    once = partial(way.run, *pair, processors)

    def work() -> None:
        for _ in range(MOST_CALLS):
            once()

    return Timed(work, MOST_CALLS, once)


def bandwidth(
    device: torch.device, seconds: float, stopwatch: Stopwatch = on_gpu, *,
    sizes: Sequence[int] = SIZES, ways: Sequence[Way] = WAYS, rounds: int = ROUNDS,
    found: Facts | None = None,
) -> Iterator[Record]:  # fmt: skip
    """A line for each size (bytes of one buffer, multiples of 16), way and state of the cache. GBps counts
    what is read and what is written. Buffers take at most a quarter of the free memory.

    found: what is known of the device; asked for if None."""
    found = found or facts(device)
    fitting = [s for s in sizes if 2 * s * rotation(s, COLD * found.l2_bytes) <= found.memory]
    values = max((s * rotation(s, COLD * found.l2_bytes) // 4 for s in fitting), default=0)
    buffers = [kernels.randoms(values, device) for _ in range(2)] if fitting else []
    budget = Budget(seconds)  # only now: what came before may have taken longer on a device that just woke up
    for number, size in enumerate(sizes):
        share = budget.share(len(sizes) - number)
        if size not in fitting or share is None:
            why = OUT_OF_TIME if size in fitting else NO_ROOM
            yield from (cannot(way.name, size_text(size), why, way.kind) for way in ways)
            continue
        count = rotation(size, COLD * found.l2_bytes)
        cut = [buffer[: count * size // 4].view(count, -1).unbind() for buffer in buffers]
        ring = Ring(list(zip(*cut, strict=True)))
        todo = {(way, "cold"): cold(way, ring, found.processors) for way in ways}
        if 2 * size <= found.l2_bytes // 2:  # both buffers, with room to spare
            # of their own: one of the ring would not be cold at its next turn
            pair = (kernels.randoms(size // 4, device), kernels.randoms(size // 4, device))
            todo |= {(way, "warm"): warm(way, pair, found.processors) for way in ways}
        for (way, cache), samples in in_turn(todo, stopwatch, share, rounds).items():
            spread = Spread.of(samples)
            yield moving(way.kind, way.name, way.ran, size, way.moves * size, cache, spread)


def copy_rate(
    device: torch.device, seconds: float = 2.0, stopwatch: Stopwatch = on_gpu, *,
    sizes: Sequence[int] = LARGE, ways: Sequence[Way] = COPIES, rounds: int = ROUNDS,
    found: Facts | None = None,
) -> float:  # fmt: skip
    """The yardstick: bytes a second, read and written ones together, of a copy that no cache helps. Of each
    way to copy the median over the large sizes; of these the best. RuntimeError if none could be measured."""
    rates: dict[str, list[float]] = defaultdict(list)
    lines = list(bandwidth(device, seconds, stopwatch, sizes=sizes, ways=ways, rounds=rounds, found=found))
    for line in lines:
        if line.cache == "cold" and line.GBps is not None:
            rates[line.variant].append(line.GBps)
    if not rates:
        raise RuntimeError(
            f"no copy could be measured: {lines[0].note if lines else 'no size was asked for'}"
        )
    return max(statistics.median(each) for each in rates.values()) * 1e9
