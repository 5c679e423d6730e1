"""The matrix that geometry.py walks over, for each layout, before tiles are chosen: its rows, the strips of
it that are blocks, and the channel that each lane holds. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

VECTOR_BYTES = 16


def packs(c: int, s: int, channels_last: bool) -> bool:
    """Whether relu's mask has a bit for each element of x, and not a byte: where each byte then belongs to
    one tile, whatever plan.py chooses, since every part of an address is a multiple of 8 elements."""
    return (c if channels_last else s) % 8 == 0


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
    """A layout as geometry.py sees it. Sizes are in elements."""

    mode: str
    rows: int
    pitch: int
    width: int
    inner: int
    channels: int
    lanes: int
    total: int
    pieces: int = 1
    channels_per_block: int = 1  # that a block reduces, as a power of two
    lanes_per_channel: int = 1  # of a block, as a power of two

    @property
    def blocks(self) -> int:
        return self.channels if self.mode == "nchw" else ceil_div(self.pitch, self.width)

    @property
    def used(self) -> float:
        """The share of lanes that hold data."""
        if self.mode == "nchw":
            return self.width / (self.pieces * self.lanes)
        return self.pitch / (self.blocks * self.lanes)

    def vector(self, itemsize: int, aligned: bool) -> int:
        """Elements of a load instruction: the largest power of two, up to 16 bytes, that divides every part
        of an address."""
        vec = gcd(VECTOR_BYTES // itemsize if aligned else 1, gcd(self.pitch, self.width))
        return gcd(vec, self.total) if self.mode == "nhwc_packed" else vec


def nhwc_view(m: int, c: int, itemsize: int, lanes: int = 0) -> View:
    """[m, c]: channels_last and 2-D input. Blocks take so many lanes, or 128 bytes of a row, which are whole
    DRAM bursts, or more where C is a little larger."""
    if not lanes:
        lanes = 128 // itemsize
        if c % lanes and c <= 2 * lanes:
            lanes = power_of_two(c)
    return View("nhwc", m, c, lanes, 1, c, lanes, m * c, channels_per_block=lanes)


def nhwc_packed_view(m: int, c: int, itemsize: int, lanes: int) -> View | None:
    """[m, c] with rows that are not whole vectors: so many rows are taken as one that they are. None: that is
    too wide for a tile."""
    fewest = (VECTOR_BYTES // itemsize) // gcd(c, VECTOR_BYTES // itemsize)  # rows that make whole vectors
    if fewest * c > lanes:
        return None
    taken = min(lanes // (fewest * c) * fewest, ceil_div(m, fewest) * fewest)
    return View(
        "nhwc_packed", ceil_div(m, taken), taken * c, taken * c, 1, c, power_of_two(taken * c), m * c,
        channels_per_block=power_of_two(c), lanes_per_channel=power_of_two(taken),
    )  # fmt: skip


def nchw_packed_view(n: int, c: int, s: int, itemsize: int, lanes: int) -> View:
    """[n, c * s] in blocks of whole channels, which start on a vector if the sizes allow it."""
    vector = VECTOR_BYTES // itemsize
    fewest = vector // gcd(s, vector)  # channels that make whole vectors
    taken = lanes // s
    taken = c if taken >= c else (taken // fewest * fewest or taken)
    width = min(lanes, power_of_two(taken * s))
    return View(
        "nchw_packed", n, c * s, taken * s, s, c, width, n * c * s,
        channels_per_block=power_of_two(taken), lanes_per_channel=power_of_two(s) if taken > 1 else width,
    )  # fmt: skip


def nchw_whole_view(n: int, c: int, s: int, channels: int) -> View:
    """[n, c * s] in blocks of so many whole channels."""
    width = power_of_two(channels * s)
    return View(
        "nchw_packed", n, c * s, channels * s, s, c, width, n * c * s, channels_per_block=channels,
        lanes_per_channel=power_of_two(s) if channels > 1 else width,
    )  # fmt: skip


def nchw_strips_view(n: int, c: int, s: int, lanes: int) -> View:
    """[n, c * s] in strips that ignore where channels begin, for elementwise kernels."""
    lanes = min(lanes, power_of_two(c * s))
    return View("nchw_packed", n, c * s, lanes, s, c, lanes, n * c * s)


def nchw_view(n: int, c: int, s: int, lanes: int) -> View:
    """[n, c * s], one channel a block, its s positions of each sample cut into pieces of a tile's width."""
    pieces = ceil_div(s, lanes)
    return View("nchw", n * pieces, c * s, s, 1, c, lanes, n * c * s, pieces, lanes_per_channel=lanes)
