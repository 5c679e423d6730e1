"""Sizes -> tiles, warps, splits and grid of each launch. Pure Python, which needs no torch, Triton or GPU.

A *pass* is one kernel's traversal of x; geometry.py defines the terms. A plan also tells what its pass costs:
bytes in flight, programs, the tail of the last program. Each choice carries its reason; [sass] marks what was
read from compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from .epilogue import ACTIVATIONS, EpiloguePlan
from .records import Geometry, Problem, Tile
from .views import (
    VECTOR_BYTES,
    View,
    ceil_div,
    floor_power_of_two,
    nchw_packed_view,
    nchw_strips_view,
    nchw_view,
    nhwc_packed_view,
    nhwc_view,
    power_of_two,
)

INT32 = 2**31
WARP = 32
MOST_PROGRAMS = 32  # that an SM has at a time


class TooLarge(ValueError):
    """Sizes beyond the 32-bit arithmetic that kernels do within a tile."""


@dataclass(frozen=True)
class Program:
    """The size of a program. warps * per_sm * loads / 2 is the KB that an SM has in flight; an H200 wants
    48."""

    warps: int
    per_sm: int  # programs that share an SM
    registers: int  # of a thread: the limit it is compiled with, so that per_sm holds
    loads: int  # 16-byte loads that a thread has in flight, over all inputs


# Reductions prefer many loads a thread to many threads. 128 registers hold 8 vectors beside the accumulators,
# where 64 hold 3 of the 4 that twice the threads would need [sass], and a thread's loop is longer for one
# epilogue. Two programs an SM leave few partial results for the last one to merge. Tensors too small for that
# take smaller programs if they are contiguous, else fewer ones.
REDUCE = (Program(8, 2, 128, 8), Program(4, 4, 128, 8), Program(4, 4, 128, 2), Program(4, 4, 128, 0))
# In nchw a tile is one channel and a thread has fewer loads, so there are more threads.
REDUCE_NCHW = (Program(8, 4, 64, 4), Program(4, 8, 64, 4), Program(4, 8, 64, 0))
# A single row of whole channels is one tile, with no second one to load meanwhile: many small programs. If
# there are enough channels, a program is a warp, which sums without shared memory.
REDUCE_ROW = (Program(4, 8, 64, 2), Program(4, 8, 64, 0))
REDUCE_ROW_WIDE = (Program(4, 4, 128, 2), Program(4, 4, 128, 0))  # smooth activations, or with the residual
REDUCE_ROW_BY_WARPS = Program(1, 16, 128, 8)
# Elementwise programs have nothing to merge, and small ones start and end more smoothly.
# By the cost of the activation (epilogue.ACTIVATIONS): piecewise linear ones take a few registers, as mask
# bits do; smooth ones many, since their intermediate values are all live at once [sass].
ELEMENTWISE = (Program(4, 7, 72, 4), Program(4, 6, 80, 4), Program(4, 5, 96, 4))
REDUCE_SMOOTH = (Program(4, 3, 168, 8), *REDUCE[2:])
REDUCE_NCHW_ACTIVATED = (Program(8, 3, 80, 4), Program(4, 6, 80, 4), Program(4, 6, 80, 0))


# What reducing a small tensor waits for, in microseconds: the loads of a tile, and those of a step of the
# merge, which come from L2. Both are assumptions, about those of benchmarks/model.py.
TILE, MERGE_STEP = 0.7, 0.25
IN_FLIGHT = 4  # iterations of a merge whose loads are waited for at once


def cost_of(activation: str) -> int:
    return ACTIVATIONS[activation].cost if activation in ACTIVATIONS else 0


@dataclass(frozen=True)
class PassPlan:
    """One kernel's pass over x."""

    view: View
    tile: Tile
    warps: int
    registers: int  # a thread, at most
    tiles: int  # of a block
    splits: int  # programs that share a block's tiles
    inputs: int  # tensors read
    itemsize: int
    samples: int = 1  # matrices like the view, one after another; 1 if groups span all samples
    group_size: int = 1  # channels of a group that lies within a sample

    @cached_property
    def programs(self) -> int:
        return self.samples * self.view.blocks * self.splits

    @cached_property
    def semaphores(self) -> int:
        """Counters of finished programs: of each block, and of each sample."""
        return self.samples * (self.view.blocks + 1)

    @cached_property
    def geometry(self) -> Geometry:
        """Raises TooLarge where a size does not fit 32 bits."""
        v = self.view
        total = v.total if v.mode == "nhwc_packed" or self.samples > 1 else 0
        g = Geometry(
            v.rows, v.pitch // self.tile.vec, v.width // self.tile.vec, v.inner, v.channels,
            self.tiles, v.pieces, total // self.tile.vec, v.blocks, self.splits,
            self.group_size, self.samples * v.channels // self.group_size,
        )  # fmt: skip
        # lanes beyond the end are masked by comparing their offsets, which must fit too
        in_tile = self.tile.tile_rows * (v.lanes if v.mode == "nchw" else v.pitch) + v.lanes
        narrow = g._replace(total_v=0)  # kernels use the total in 64 bits
        if max(*narrow, in_tile, self.programs, self.samples * v.channels * 6, self.partials) >= INT32:
            raise TooLarge(f"this tensor is too large for 32-bit tile offsets, grid or tables: {v}")
        return g

    @property
    def values(self) -> int:
        """Partial results of a channel: pivot, shift and M2 of x alone; two sums of x and dy."""
        return 3 if self.inputs == 1 else 2

    @cached_property
    def partials(self) -> int:
        """Elements of the workspace for partial results. A reduction of x alone stores a count for each block
        too."""
        counts = self.view.blocks if self.inputs == 1 else 0
        return self.samples * self.splits * (self.values * self.view.channels + counts)

    @property
    def handed(self) -> int:
        """Values that programs hand to others: partial results, and those of channels that are merged to
        groups."""
        merged = self.samples * self.values * self.view.channels if self.group_size > 1 else 0
        return self.partials + merged

    @cached_property
    def bytes_per_program(self) -> float:
        """Bytes that a program has in flight when it issues the loads of one tile, of all inputs."""
        return self.inputs * self.tile.tile_rows * self.view.lanes * self.itemsize * self.view.used

    @cached_property
    def tail_bytes(self) -> int:
        """Bytes that the last program of a block reads back: the part of a launch that one SM does alone."""
        return self.splits * (3 * self.view.channels_per_block + 1) * max(4, self.itemsize)


def _rows_view(m: int, c: int, itemsize: int, *lanes: int) -> View:
    """[m, c], packed in tiles of the first of these widths that is wide enough, if rows are not whole
    vectors."""
    view = nhwc_view(m, c, itemsize)
    if view.vector(itemsize, True) * itemsize == VECTOR_BYTES:
        return view
    return next(filter(None, (nhwc_packed_view(m, c, itemsize, width) for width in lanes)), view)


def _reduce_view(n: int, c: int, s: int, itemsize: int, channels_last: bool, program: Program) -> View:
    lanes = program.warps * WARP * (VECTOR_BYTES // itemsize)
    if channels_last:
        return _rows_view(n * s, c, itemsize, lanes)
    if s > 2 * lanes:
        return nchw_view(n, c, s, lanes)
    return nchw_packed_view(n, c, s, itemsize, lanes if s <= lanes else 2 * lanes)


def _evened(tiles: int, splits: int) -> int:
    """The fewest splits with the same number of rounds, unless that leaves too much of the GPU idle."""
    splits = max(1, min(tiles, splits))
    even = ceil_div(tiles, ceil_div(tiles, splits))
    return even if even >= 0.85 * splits else splits


def reducing(
    tile: Tile, view: View, warps: int, registers: int, splits: int, group_size: int = 1, wide: bool = False
) -> Tile:  # fmt: skip
    """The tile with what a reduction does at a time: as much as its registers hold. wide: in fp64."""
    threads, channels, channels_at_once = WARP * warps, view.channels_per_block, view.lanes
    if view.mode != "nhwc":
        # beside eight loads, Triton 3.9 spills two registers at 4 [sass]
        values = 4 if registers >= 128 and tile.unroll < 8 else 2
        channels_at_once = min(channels, max(1, values * threads // view.lanes_per_channel))
    # 4 values a thread, so that loads overlap within 64 registers
    partials = min(power_of_two(splits), max(1, 4 * threads // channels))
    # a warp, which takes many turns, waits for more at a time
    values = (2 if registers < 128 else 16 if warps == 1 else 8) * threads
    members = min(power_of_two(group_size), values)
    groups = min(power_of_two(view.channels // group_size), values // members)
    ahead = min(1 if wide else IN_FLIGHT, power_of_two(ceil_div(splits, partials)))
    return replace(
        tile, channels=channels, channels_per_iter=channels_at_once, partials_per_iter=partials,
        iters_in_flight=ahead, lanes_per_channel=view.lanes_per_channel, groups_per_iter=groups,
        members_per_iter=members,
    )  # fmt: skip


class Fitted(NamedTuple):
    """A tile of a view in a program of this size."""

    tile: Tile
    warps: int
    registers: int
    per_sm: int
    tiles: int  # of a block


def fitted(x: Problem, view: View, program: Program, inputs: int, stacked: bool) -> Fitted:
    """The tile that fills the loads of a program. stacked: whether a load of all threads may cover several
    rows, though lanes are positions."""
    warps, per_sm, registers = program.warps, program.per_sm, program.registers
    vectors = warps * WARP * (VECTOR_BYTES // x.itemsize)  # elements that one load of all threads brings
    group_rows = 1
    if view.mode == "nhwc" or (stacked and view.mode == "nchw_packed"):
        group_rows = min(max(1, vectors // view.lanes), power_of_two(view.rows))
    unroll = max(1, program.loads // inputs * vectors // max(vectors, group_rows * view.lanes))
    vec = view.vector(x.itemsize, x.aligned)
    narrow = vec * x.itemsize < VECTOR_BYTES
    if narrow:  # these are several loads already
        unroll = max(1, unroll * min(2 * vec * x.itemsize, VECTOR_BYTES) // VECTOR_BYTES) if stacked else 1
    unroll = min(
        unroll, floor_power_of_two(view.pieces if view.mode == "nchw" else ceil_div(view.rows, group_rows))
    )
    if narrow or x.itemsize == 8:  # they need 128 registers
        registers = max(128, registers)
        per_sm = min(per_sm, 65536 // (warps * WARP * registers))
    # no more warps than there are vectors in group_rows rows
    most = warps
    warps = max(1, min(warps, ceil_div(group_rows * view.lanes * x.itemsize, VECTOR_BYTES * WARP)))
    per_sm = min(MOST_PROGRAMS, per_sm * most // floor_power_of_two(warps))
    align = vec if view.mode == "nchw_packed" and view.inner % vec == 0 else 1
    tile = Tile(view.mode, vec, unroll, group_rows, view.lanes, align)
    return Fitted(tile, warps, registers, per_sm, ceil_div(view.rows, unroll * group_rows))


def _pass(
    x: Problem, view: View, program: Program, inputs: int, reduces: bool, samples: int, group_size: int
) -> tuple[PassPlan, bool]:
    """The plan of a kernel that goes over this view in programs of this size, and whether its tiles are
    enough to fill the GPU."""
    tile, warps, registers, per_sm, tiles = fitted(x, view, program, inputs, False)
    strips, programs = view.blocks * samples, x.sms * min(per_sm, program.per_sm)
    splits = _evened(tiles, programs // strips if reduces else ceil_div(programs, strips))
    if reduces:
        tile = reducing(tile, view, warps, registers, splits, group_size, x.itemsize == 8)
    plan = PassPlan(view, tile, warps, registers, tiles, splits, inputs, x.itemsize, samples, group_size)
    return plan, tiles * strips >= programs


def _in_few_programs(plan: PassPlan) -> PassPlan:
    """The plan with as many programs a block as take the least time, where not all would be busy anyway: few
    go through many tiles each, many leave a long merge to the last one."""

    def splits_in(turns: int) -> PassPlan:
        splits = ceil_div(plan.tiles, turns)
        wide = plan.itemsize == 8
        tile = reducing(
            plan.tile, plan.view, plan.warps, plan.registers, splits, plan.group_size, wide
        )  # fmt: skip
        return replace(plan, splits=splits, tile=tile)

    def microseconds(each: PassPlan) -> float:
        steps = ceil_div(each.splits, each.tile.partials_in_flight)
        return ceil_div(each.tiles, each.splits) * TILE + steps * MERGE_STEP

    fewest = ceil_div(plan.tiles, plan.splits)
    return min((splits_in(turns) for turns in range(fewest, fewest + 8)), key=microseconds)


@lru_cache(maxsize=4096)
def plan_reduction(
    x: Problem, inputs: int, samples: int = 1, group_size: int = 1, activation: str = "none"
) -> PassPlan:
    """The plan of a kernel that reduces x, or `samples` tensors like x, over n and s. activation: the one
    whose slope it computes."""
    n, c, s, itemsize, channels_last, *_ = x
    cost = cost_of(activation)
    programs: Sequence[Program] = REDUCE if cost < 2 else REDUCE_SMOOTH
    if not channels_last and s > 2 * REDUCE[0].warps * WARP * (VECTOR_BYTES // itemsize):
        programs = REDUCE_NCHW_ACTIVATED if cost else REDUCE_NCHW
    elif not channels_last and n == 1:
        programs = REDUCE_ROW if cost < 2 and inputs < 3 else REDUCE_ROW_WIDE
        if itemsize < 8 and s % (VECTOR_BYTES // itemsize) == 0:  # fp64 has no registers for it [sass]
            programs = (REDUCE_ROW_BY_WARPS, *programs)
    for program in programs:
        view = _reduce_view(n, c, s, itemsize, channels_last, program)
        plan, full = _pass(x, view, program, inputs, True, samples, group_size)
        # where the last piece of each channel is mostly empty, a narrower tile does better
        if full and not (view.mode == "nchw" and view.used < 0.85):
            break
        if channels_last:
            return _in_few_programs(plan)
    return plan


@lru_cache(maxsize=4096)
def plan_elementwise(
    x: Problem, inputs: int, samples: int = 1, group_size: int = 1, activation: str = "none"
) -> PassPlan:
    """The plan of an elementwise kernel over x, or `samples` tensors like x, with coefficients of each
    channel. activation: the one that it applies, or whose slope it computes."""
    n, c, s, itemsize, channels_last, aligned, _ = x
    vector, program = VECTOR_BYTES // itemsize, ELEMENTWISE[cost_of(activation)]
    lanes = ELEMENTWISE[0].warps * WARP * vector
    if channels_last:
        view = _rows_view(n * s, c, itemsize, lanes, 4 * lanes)
    elif s >= ELEMENTWISE[0].loads * lanes and s % vector == 0:
        view = nchw_view(n, c, s, lanes)  # one channel a program: scalar coefficients
    else:
        # a single row has no second one to load meanwhile, so its tile is wider, if a vector has one
        # coefficient
        wider = ELEMENTWISE[0].loads // inputs if n == 1 and s % vector == 0 and aligned else 1
        view = nchw_strips_view(n, c, s, wider * lanes)
    return _pass(x, view, program, inputs, False, samples, group_size)[0]


@dataclass(frozen=True)
class StepPlan:
    """The passes of a training step over x, one or two each way, and its launches and bytes, where all
    gradients are wanted."""

    elements: int  # of x
    itemsize: int
    forward: tuple[Any, ...]  # a PassPlan each, or a single group_plan.OnePassPlan
    backward: tuple[Any, ...]
    epilogue: EpiloguePlan
    stats: int = 0  # statistics of groups; those of channels, a few floats each, are not counted
    sums: int = 0  # of each sample for weight and bias, which one launch more adds up

    @property
    def forward_launches(self) -> int:
        return len(self.forward)

    @property
    def backward_launches(self) -> int:
        return len(self.backward) + (self.sums > 0)

    @property
    def x_bytes(self) -> int:
        """T: the bytes of x."""
        return self.elements * self.itemsize

    @property
    def forward_bytes(self) -> int:
        """Every pass reads x, and the last one writes y. Statistics are written, and read by a second pass.
        Partial results go out and back. Weight and bias are not counted, nor are statistics that several
        programs read."""
        passes, wide = len(self.forward), max(4, self.itemsize)
        more = self.epilogue.forward_bytes(self.elements, self.itemsize)
        return (1 + passes) * self.x_bytes + more + (2 * self.forward[0].handed + passes * self.stats) * wide

    @property
    def backward_bytes(self) -> int:
        """Every pass reads dy and x, and the last one writes dx. The forward's statistics are read. Partial
        results, the coefficients of dx for a second pass, and sums go out and back."""
        passes, wide = len(self.backward), max(4, self.itemsize)
        more = self.epilogue.backward_bytes(self.elements, self.itemsize)
        handed = 2 * self.backward[0].handed + (2 * passes - 1) * self.stats + 2 * self.sums
        return (1 + 2 * passes) * self.x_bytes + more + handed * wide
