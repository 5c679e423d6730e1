"""How each layout is seen by geometry.py, before tiles are chosen: which matrix, which strips of it, which
lanes hold which channel. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

VECTOR_BYTES = 16


def packs(c: int, s: int, itemsize: int, channels_last: bool) -> bool:
    """Whether all that plan.py makes of an address is a multiple of 8 elements, whatever programs it chooses:
    then each byte of signs (activations.py) belongs to one tile. In planes of s positions, blocks begin on
    multiples of 16 bytes only, and only where they hold several channels."""
    if channels_last:
        return c % 8 == 0
    if s % 8 == 0:
        return True
    smallest = 4 * 32 * VECTOR_BYTES // itemsize  # lanes of the smallest program
    return itemsize == 2 and c * s % 8 == 0 and s * (8 // gcd(s, 8)) <= smallest


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def floor_power_of_two(n: int) -> int:
    """The largest power of two <= n (1 for 0)."""
    return 1 << max(0, n.bit_length() - 1)


@dataclass(frozen=True)
class View:
    """How a layout is seen by geometry.py, before tiles are chosen. Sizes in elements."""

    mode: str
    rows: int
    pitch: int
    width: int
    inner: int
    channels: int
    lanes: int
    total: int
    pieces: int = 1
    channels_a_block: int = 1  # what a block is answerable for, as a power of two
    positions: int = 1  # lanes of a block that hold the same channel, as a power of two

    @property
    def blocks(self) -> int:
        return self.channels if self.mode == "runs" else ceil_div(self.pitch, self.width)

    @property
    def used(self) -> float:
        """Share of the lanes that carry data."""
        if self.mode == "runs":
            return self.width / (self.pieces * self.lanes)
        return self.pitch / (self.blocks * self.lanes)

    def vector(self, itemsize: int, aligned: bool) -> int:
        """Elements a load instruction: the largest power of two up to 16 bytes that divides all that an
        address is made of.
        """
        vec = gcd(VECTOR_BYTES // itemsize if aligned else 1, gcd(self.pitch, self.width))
        return gcd(vec, self.total) if self.mode == "cycles" else vec


def rows_view(m: int, c: int, itemsize: int) -> View:
    """[m, c]: channels_last and 2-D input. Blocks of 128 bytes a row, whole DRAM bursts; wider ones where C
    divides badly.
    """
    lanes = 128 // itemsize
    if c % lanes and c <= 2 * lanes:
        lanes = power_of_two(c)
    return View("rows", m, c, lanes, 1, c, lanes, m * c, channels_a_block=lanes)


def cycles_view(m: int, c: int, itemsize: int, lanes: int) -> View | None:
    """[m, c] with rows that are not whole vectors: as many rows taken as one as make it so. None: too wide
    for a tile.
    """
    step = (VECTOR_BYTES // itemsize) // gcd(c, VECTOR_BYTES // itemsize)
    if step * c > lanes:
        return None
    taken = min(lanes // (step * c) * step, ceil_div(m, step) * step)
    return View(
        "cycles", ceil_div(m, taken), taken * c, taken * c, 1, c, power_of_two(taken * c), m * c,
        channels_a_block=power_of_two(c), positions=power_of_two(taken),
    )  # fmt: skip


def planes_view(n: int, c: int, s: int, itemsize: int, lanes: int) -> View:
    """[n, c * s], a block of whole channels, starting on a vector where the sizes allow one at all."""
    step = (VECTOR_BYTES // itemsize) // gcd(s, VECTOR_BYTES // itemsize)
    held = lanes // s
    held = c if held >= c else (held // step * step or held)
    return View(
        "planes",
        n,
        c * s,
        held * s,
        s,
        c,
        min(lanes, power_of_two(held * s)),
        n * c * s,
        channels_a_block=power_of_two(held),
        positions=power_of_two(s) if held > 1 else min(lanes, power_of_two(s)),
    )


def strips_view(n: int, c: int, s: int, lanes: int) -> View:
    """[n, c * s] in strips that ignore where channels begin: nothing is reduced, so a lane only needs to
    know its channel.
    """
    lanes = min(lanes, power_of_two(c * s))
    return View("planes", n, c * s, lanes, s, c, lanes, n * c * s)


def runs_view(n: int, c: int, s: int, lanes: int) -> View:
    """One channel a block, its runs of s positions cut into pieces of a tile's width."""
    pieces = ceil_div(s, lanes)
    return View("runs", n * pieces, c * s, s, 1, c, lanes, n * c * s, pieces, positions=lanes)
