"""Sizes -> what to launch, for a normalization of rows: x is [rows, width], statistics are of each row. Pure
Python, as plan.py.

One load of a warp brings 512 bytes of a row. Some warps share a row, of which each thread holds `parts`
vectors; where these are fewer warps than the program has, it holds several rows. What fits in registers
without spills was read from compiled kernels, of Triton 3.6.0 to 3.9.0 [sass]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from .plan import INT32, WARP, TooLarge
from .records import ColumnGeometry, RowGeometry, RowTile
from .views import VECTOR_BYTES, ceil_div, power_of_two

LINE = WARP * VECTOR_BYTES  # bytes that a warp loads at once

# Forward, by itemsize: the vectors of a row that a thread may hold, by the warps that share a row. 8 vectors
# of 16-bit numbers take 96 to 128 registers, since they are widened early, and bring 64 KB in flight an SM.
# Rows of 8192 columns have 8 warps: 4 vectors take 80 registers and bring 48 KB, in half the time from the
# first load to the last store. With 16 warps, at the limit of 128 registers, Triton 3.7.1 spills two of 8
# vectors, and none of 7. fp32 takes 66 registers [sass]. 16-bit numbers that are loaded one by one take a
# register each.
HELD = {2: {1: 8, 4: 7, 8: 8, 16: 7}, 4: dict.fromkeys((1, 2, 4, 8, 16), 8)}
HELD[8] = HELD[4]
HELD_SINGLES = dict.fromkeys((1, 2, 4, 8, 16), 4)
# Longer rows, and those of several warps, load gamma and beta ahead of their use, into 16 registers more. For
# a warp with a short row of its own that is dearer than waiting for L1: two programs an SM less [sass].
AT_HAND = 3
LOADS = 4  # in flight at least: from several rows, where one has fewer
FORWARD_WARPS, FORWARD_REGISTERS = 4, 128
# Longer rows: 4 loads a thread. With 80 registers, 3 programs share an SM and have 48 KB in flight [sass].
LONG_WARPS, LONG_LOADS = 8, 4
LONG_REGISTERS = {2: 80, 4: 80, 8: 128}

# Backward, by warps: (programs an SM, registers). dy, x and two sums for each column take 16 registers for a
# vector of 16-bit numbers. 3 programs of 4 warps have up to 48 KB in flight, and leave fewer partial results
# than many small ones would [sass].
GRADIENTS = {4: (3, 168), 8: (2, 128), 16: (1, 128)}
# Warps that share a row leave fewer sums to add up, and each thread holds those of fewer columns.
GRADIENT_WARPS = 4
# The vectors of a row that a thread holds, by itemsize and by the warps that share a row: 4 of 16-bit numbers
# fit into 168 registers if all threads are in step, and 2 if they are loaded element by element.
GRADIENT_SINGLES = dict.fromkeys((1, 2, 4, 8, 16), 2)
GRADIENT_PARTS = {2: {1: 3, 2: 3, 4: 4, 8: 3, 16: 3}, 4: dict.fromkeys((1, 2, 4, 8, 16), 4)}
GRADIENT_PARTS[8] = GRADIENT_PARTS[4]
# By columns, for rows too wide for that, or if only parameters need gradients: 4 loads a thread and input.
COLUMN_WARPS, COLUMN_LOADS, COLUMN_PER_SM, COLUMN_REGISTERS = 8, 4, 2, 128
WIDE_WARPS, WIDE_LOADS, WIDE_PER_SM, WIDE_REGISTERS = 8, 2, 4, 64
WIDE_SPLITS = 32  # each program of a row merges all of its shares, so there may not be many
MERGE = 256
# The sum of partial results takes 128 bytes of each of 128 rows at a time, 16 loads a thread; of fewer rows
# more, and where that leaves SMs without a program, a sector of 32 bytes at least.
SUM_WARPS, SUM_TILE, SUM_ROWS, SUM_LANES, SUM_REGISTERS = 8, 4096, 128, 8, 128


@dataclass(frozen=True)
class RowPlan:
    """One kernel's pass over rows."""

    programs: int
    tile: RowTile
    geometry: RowGeometry | ColumnGeometry
    warps: int
    registers: int
    partials: int = 0  # rows of partial sums that it stores, one or two values a column in each
    loads: int = 0  # vectors that a thread has in flight, over all inputs

    @property
    def vec(self) -> int:
        return self.tile.vec

    @property
    def shares(self) -> int:
        """Of each row's sums, that all blocks of columns store."""
        return self.geometry.blocks * self.tile.shares


@dataclass(frozen=True)
class Rows:
    """The sizes that all plans start from. aligned: every tensor starts on 16 bytes. sms: the GPU's
    number."""

    rows: int
    width: int
    itemsize: int
    aligned: bool
    sms: int

    @property
    def vec(self) -> int:
        """Elements of a load instruction: as many of 16 bytes as divide the width."""
        return gcd(VECTOR_BYTES // self.itemsize if self.aligned else 1, self.width)

    @property
    def vectors(self) -> bool:
        return self.vec * self.itemsize == VECTOR_BYTES

    @property
    def line(self) -> int:
        """Elements that one load of a warp brings."""
        return LINE // self.itemsize

    def shared_by(self, most: dict[int, int]) -> tuple[int, int, int] | None:
        """(warps that share a row, lanes, parts) with the fewest warps for which a thread holds at most the
        vectors of a row that `most` allows; None if no program is large enough."""
        for warps, limit in most.items():
            lanes = min(warps * self.line, power_of_two(self.width))
            parts = ceil_div(self.width, lanes)
            if parts <= limit:
                return warps, lanes, parts
        return None

    def spread(self, warps: int, lanes: int, parts: int) -> tuple[int, int]:
        """(lanes, parts) with a row's vectors over as many of the warps as leave at most a quarter of the
        lanes idle."""
        wider = lanes
        while wider < min(warps * self.line, self.width):
            wider *= 2
            if 3 * wider * ceil_div(self.width, wider) <= 4 * self.width:
                lanes, parts = wider, ceil_div(self.width, wider)
        return lanes, parts

    def partial_rows(self, warps: int, group: int, lanes: int) -> int:
        """The rows of sums of columns that a program leaves of a group of rows: one for each of its warps,
        or of the warps that share a row."""
        at_once = WARP * self.vec  # elements that a warp loads
        warps = self.filled(warps, group * lanes)
        return max(1, min(group // max(1, at_once // lanes), warps // max(1, lanes // at_once)))

    def filled(self, warps: int, elements: int) -> int:
        """As many of the warps as have something to load."""
        return max(1, min(warps, elements * self.itemsize // LINE))

    def even(self, lanes: int, parts: int) -> bool:
        return lanes * parts == self.width

    def plan(
        self, grid: int, tile: RowTile, warps: int, registers: int, loads: int, partials: int = 0,
        along: bool = False, **geometry: int,
    ) -> RowPlan:  # fmt: skip
        """The plan with these numbers and no more warps than there are vectors. along: `unroll` counts tiles
        along a row. Raises TooLarge if a number does not fit the 32 bits that kernels use for it."""
        at_once, step = (1, tile.unroll * tile.lanes) if along else (tile.unroll * tile.rows, tile.lanes)
        within = max(self.width * max(2, at_once), 2 * self.width + step)
        if max(grid, self.rows + at_once, within) >= INT32:
            raise TooLarge(f"{self.rows} rows of {self.width} are too many for 32-bit offsets or grids")
        warps = self.filled(warps, tile.rows * tile.lanes)
        sizes = RowGeometry(self.rows, self.width // self.vec, **geometry)
        return RowPlan(grid, tile, sizes, warps, registers, partials, loads)


@lru_cache(maxsize=4096)
def forward(size: Rows, heavy: bool = False) -> tuple[str, RowPlan]:
    """("one_pass" or "two_pass", the plan of the forward). heavy: a residual is added, before a smooth
    activation. Its loads are in flight as well, and with 4 of each Triton 3.6 spills [sass]."""
    shared = size.shared_by(HELD[size.itemsize] if size.vectors else HELD_SINGLES)
    if shared is None:
        registers = LONG_REGISTERS[size.itemsize] if size.vectors else 128
        tile = RowTile(size.vec, 1, LONG_WARPS * size.line, LONG_LOADS)
        return "two_pass", size.plan(size.rows, tile, LONG_WARPS, registers, LONG_LOADS, along=True)
    across, lanes, parts = shared
    at_once = max(1, max(FORWARD_WARPS, across) * size.line // lanes)
    most = LOADS // 2 if heavy else LOADS
    unroll = max(1, most // parts) if size.vectors else 1  # narrow loads are several already
    while unroll > 1 and ceil_div(size.rows, unroll * at_once) < 2 * size.sms:
        unroll //= 2
    group = min(unroll * at_once, power_of_two(size.rows))
    programs, loads = ceil_div(size.rows, group), parts * max(1, group // at_once)
    early = across > 1 or parts > AT_HAND
    tile = RowTile(size.vec, group, lanes, parts=parts, even=size.even(lanes, parts), early=early)
    return "one_pass", size.plan(programs, tile, max(FORWARD_WARPS, across), FORWARD_REGISTERS, loads)


@lru_cache(maxsize=4096)
def gradients(size: Rows) -> RowPlan | None:
    """The plan of the backward that reads rows once; None if they are too wide for it."""
    shared = size.shared_by(GRADIENT_PARTS[size.itemsize] if size.vectors else GRADIENT_SINGLES)
    if shared is None:
        return None
    warps = max(GRADIENT_WARPS, shared[0])
    lanes, parts = size.spread(warps, *shared[1:])
    per_sm, registers = GRADIENTS[warps]
    group = min(max(1, warps * size.line // lanes), power_of_two(size.rows))
    even = size.even(lanes, parts)
    unroll = {1: 4, 2: 2}.get(parts, 1)
    if not size.vectors or (warps > 4 and not even):  # masks take the remaining registers
        unroll = 1
    while unroll > 1 and ceil_div(size.rows, unroll * group) < per_sm * size.sms:
        unroll //= 2
    groups = ceil_div(size.rows, unroll * group)
    programs, left = _evened(groups, per_sm * size.sms), size.partial_rows(warps, group, lanes)
    tile = RowTile(size.vec, group, lanes, unroll, parts, even, partial_rows=left)
    return size.plan(
        programs, tile, warps, registers, 2 * parts * unroll, programs * left, groups=groups,
        programs=programs,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def column_gradients(size: Rows) -> RowPlan:
    """The plan of the pass by columns: parameter gradients, and each block's share of its rows' sums."""
    lanes = min(size.line, power_of_two(size.width))
    lanes, blocks = size.spread(COLUMN_WARPS, lanes, ceil_div(size.width, lanes))
    group = min(COLUMN_WARPS * size.line // lanes, power_of_two(size.rows))
    unroll = min(COLUMN_LOADS if size.vectors else 1, power_of_two(ceil_div(size.rows, group)))
    groups = ceil_div(size.rows, unroll * group)
    programs = _evened(groups, ceil_div(COLUMN_PER_SM * size.sms, blocks))
    left = size.partial_rows(COLUMN_WARPS, group, lanes)
    shares = max(1, lanes // size.line) if size.vectors else 1
    tile = RowTile(size.vec, group, lanes, unroll, partial_rows=left, shares=shares)
    return size.plan(
        blocks * programs, tile, COLUMN_WARPS, COLUMN_REGISTERS, 2 * unroll, programs * left, groups=groups,
        programs=programs, blocks=blocks,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def wide_gradients(size: Rows) -> RowPlan:
    """The plan of dx from the shares that the pass by columns has stored."""
    shares = column_gradients(size).shares
    lanes = WIDE_WARPS * size.line
    pieces = ceil_div(size.width, WIDE_LOADS * lanes)
    splits = max(1, min(pieces, WIDE_SPLITS, ceil_div(WIDE_PER_SM * size.sms, size.rows)))
    tile = RowTile(size.vec, 1, lanes, WIDE_LOADS, partials_per_iter=MERGE)
    registers = WIDE_REGISTERS if size.vectors and size.itemsize < 8 else 128
    return size.plan(
        size.rows * splits, tile, WIDE_WARPS, registers, 2 * WIDE_LOADS, along=True, blocks=shares,
        splits=splits,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def activation(size: Rows) -> RowPlan:
    """The plan of dresidual, element by element."""
    lanes = min(WIDE_WARPS * size.line, power_of_two(size.width))
    group = min(max(1, WIDE_WARPS * size.line // lanes), power_of_two(size.rows))
    groups = ceil_div(size.rows, group)
    splits = max(1, min(ceil_div(size.width, lanes), ceil_div(WIDE_PER_SM * size.sms, groups)))
    tile = RowTile(size.vec, group, lanes)
    return size.plan(groups * splits, tile, WIDE_WARPS, FORWARD_REGISTERS, 2, splits=splits)


@lru_cache(maxsize=4096)
def column_sums(rows: int, columns: int, halves: int, sms: int = 132) -> RowPlan:
    """The plan of the sum of [rows, halves, columns] over rows. Each program adds up all rows of a strip of
    columns, narrow enough that there are as many programs as SMs."""
    lanes = min(SUM_TILE // min(SUM_ROWS, power_of_two(rows)), 1024, power_of_two(columns))
    while lanes > SUM_LANES and halves * ceil_div(columns, lanes) < sms:
        lanes //= 2
    at_once = min(SUM_TILE // lanes, power_of_two(rows))
    while at_once * halves * columns >= INT32 and at_once > 1:
        at_once //= 2
    blocks = ceil_div(columns, lanes)
    if max(rows + at_once, 2 * columns + lanes) >= INT32:
        raise TooLarge(f"{rows} partial sums of {columns} columns are too many for 32-bit offsets")
    warps = max(1, min(SUM_WARPS, at_once * lanes // (4 * WARP)))
    tile, geometry = RowTile(1, at_once, lanes), ColumnGeometry(rows, columns, blocks)
    return RowPlan(halves * blocks, tile, geometry, warps, SUM_REGISTERS)


def launches(size: Rows) -> tuple[int, int]:
    """The launches of a training step, (forward, backward), if all gradients are wanted. The last one of the
    backward is column_sums."""
    return 1, 3 if gradients(size) is None else 2


def _evened(groups: int, most: int) -> int:
    """At most `most` programs, and the fewest with the same number of rounds."""
    return ceil_div(groups, ceil_div(groups, max(1, min(groups, most))))
