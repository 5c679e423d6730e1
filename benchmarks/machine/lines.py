"""What the probes write: lines of a benchmark's CSV."""

from __future__ import annotations

from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.stopwatch import Spread

OUT_OF_TIME = "the time given to this probe was over before its turn"
NO_ROOM = "its buffers need more than a quarter of the free memory"


def size_text(size: int) -> str:
    """Bytes in the largest unit that leaves a whole number: 65536 is "64 KiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def moving(kind: str, variant: str, ran: str, size: int, moved: int, cache: str, spread: Spread) -> Record:
    """A buffer of `size` bytes, and `moved` bytes of traffic in the time measured."""
    return Record(
        kind, MEASURED, variant, ran, shape=size_text(size), dtype="fp32", cache=cache, mode="eager",
        floor_bytes=moved, GBps=moved / spread.us / 1e3, **vars(spread),
    )  # fmt: skip


def cannot(variant: str, shape: str, why: str, kind: str = "probe") -> Record:
    return Record(kind, CANNOT, variant, shape=shape, note=why)
