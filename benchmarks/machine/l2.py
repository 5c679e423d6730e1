"""How much of a buffer is still in L2 when a second kernel sweeps over it.

Only the second sweep is timed, right after the first, forwards or in reverse, and beside it one that finds
nothing of the buffer in L2. All three launch the same kernel over the same bytes, so that what they differ by
is where the bytes came from. Under least-recently-used replacement, a buffer larger than the L2 leaves a
second sweep nothing if it goes forwards; in reverse, it finds what the first sweep touched last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.machine import kernels
from benchmarks.machine.facts import Facts, facts
from benchmarks.machine.lines import NO_ROOM, OUT_OF_TIME, cannot, moving, size_text
from benchmarks.records import MEASURED, Record
from benchmarks.stopwatch import ROUNDS, Budget, Spread, Stopwatch, Timed, in_turn, on_gpu

EIGHTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)  # of the L2: what the buffer's size is
FLUSH = 4  # times the L2 are read in between, to leave nothing of the buffer there
MARGIN = 1.15  # so many times as fast as from memory: the second sweep found part of the buffer in L2
COLD = "read from memory"
Sweep = Callable[..., None]


@dataclass(frozen=True)
class Order:
    """What the first sweep does, and which way the second, which reads, goes."""

    writes: bool
    reverse: bool

    def __str__(self) -> str:
        first = "write" if self.writes else "read"
        return f"read after {first}, {'in reverse' if self.reverse else 'forwards'}"


ORDERS = tuple(itertools.starmap(Order, itertools.product((True, False), (False, True))))


def sizes_of(l2_bytes: int, eighths: Sequence[int]) -> list[int]:
    """Bytes of the buffer, in whole pages of 4 KiB."""
    return [l2_bytes * part // 8 // 4096 * 4096 for part in eighths]


def sweeps(
    buffer: Tensor, other: Tensor, sums: Tensor, processors: int, read: Sweep, write: Sweep
) -> dict[str, Timed]:
    """A second sweep of each order, and one from memory. other: what is read to empty the L2."""
    forwards = partial(read, buffer, sums, processors)
    flush = partial(read, other, sums, processors)

    def after(order: Order) -> Timed:
        first = partial(write, buffer, processors) if order.writes else forwards
        # flushed before, too: each sample starts from the same state
        return Timed(partial(forwards, reverse=order.reverse), prepare=lambda: (flush(), first()))

    cold = Timed(forwards, prepare=lambda: (forwards(), flush()))
    return {COLD: cold} | {str(order): after(order) for order in ORDERS}


def reuse(times: Mapping[int, tuple[float, float]]) -> int:
    """The largest size (of bytes -> microseconds from memory, of the second sweep) that was MARGIN times as
    fast in the second sweep; 0 if none was."""
    return max((size for size, (cold, second) in times.items() if cold / second >= MARGIN), default=0)


def verdict(order: str, times: Mapping[int, tuple[float, float]]) -> Record:
    size = reuse(times)
    note = f"largest buffer whose second sweep is at least {MARGIN} times as fast as from memory"
    if size == max(times):
        note = f"at least: no larger one was tried; {note}"
    return Record("probe", MEASURED, f"L2 reuse: {order}", "read_kernel", shape=size_text(size), note=note)


def l2_reuse(
    device: torch.device, seconds: float, stopwatch: Stopwatch = on_gpu, *,
    read: Sweep = kernels.read, write: Sweep = kernels.write, eighths: Sequence[int] = EIGHTHS,
    rounds: int = ROUNDS, found: Facts | None = None,
) -> Iterator[Record]:  # fmt: skip
    """For each size a line from memory and one for each order; then for each order how large a buffer may be
    to be reused (its size is the line's `shape`). Buffers take at most a quarter of the free memory.

    read, write: what sweeps, called as kernels.read and kernels.write are. found: see bandwidth."""
    budget, found = Budget(seconds), found or facts(device)
    sizes, flushed = sizes_of(found.l2_bytes, eighths), FLUSH * found.l2_bytes
    fitting = [size for size in sizes if size + flushed <= found.memory]
    times: dict[str, dict[int, tuple[float, float]]] = {str(order): {} for order in ORDERS}
    if fitting:
        whole, other = (kernels.randoms(size // 4, device) for size in (max(fitting), flushed))
        sums = torch.empty(max(flushed, *fitting) // 4 // kernels.SMALLEST + 1, device=device)
    for number, size in enumerate(sizes):
        share = budget.share(len(sizes) - number)
        if size not in fitting or share is None:
            yield cannot("L2 reuse", size_text(size), OUT_OF_TIME if size in fitting else NO_ROOM)
            continue
        timed = sweeps(whole[: size // 4], other, sums, found.processors, read, write)
        spreads = {name: Spread.of(s) for name, s in in_turn(timed, stopwatch, share, rounds).items()}
        for name, spread in spreads.items():
            cache = "cold" if name == COLD else "warm"
            yield moving("probe", name, "read_kernel", size, size, cache, spread)
            if name != COLD:
                times[name][size] = (spreads[COLD].us, spread.us)
    yield from (verdict(order, measured) for order, measured in times.items() if measured)
