"""Sizes -> what to launch: tiles, warps, splits, grid. Pure Python; needs neither torch nor Triton nor a GPU.

A *sweep* is one kernel's walk over x (geometry.py has the words). Its plan also knows what it costs: bytes in
flight, programs, the tail of the finalising program. Each choice carries its reason; [sass] marks what was
read off compiled kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from .epilogue import ACTIVATIONS, NO_EPILOGUE_PLAN, EpiloguePlan
from .records import Geometry, Problem, Tile
from .views import (
    VECTOR_BYTES,
    View,
    ceil_div,
    cycles_view,
    floor_power_of_two,
    planes_view,
    power_of_two,
    rows_view,
    runs_view,
    strips_view,
)

INT32 = 2**31
WARP = 32


class TooLarge(ValueError):
    """Sizes beyond the kernels' 32-bit arithmetic within a tile."""


@dataclass(frozen=True)
class Program:
    """How large a program is, how many share an SM, the registers a thread is compiled for to make that so,
    and the 16-byte loads that a thread has under way at a time, over all inputs. warps * an_sm * loads / 2
    is KB in flight an SM: an H200 wants 48."""

    warps: int
    an_sm: int
    registers: int
    loads: int


# Reducing programs. Many loads a thread rather than many threads: a thread then runs its loop longer for
# one epilogue, and 128 registers hold 8 vectors beside the accumulators, where 64 hold 3 of the 4 that
# twice the threads would need [sass]. Two programs an SM leave few partials for the last one to merge.
# Tensors too small for that take smaller programs.
REDUCE = (Program(8, 2, 128, 8), Program(4, 4, 128, 8), Program(4, 4, 128, 2), Program(4, 4, 128, 0))
# A run of S positions holds fewer loads a thread, so more threads.
REDUCE_RUNS = (Program(8, 4, 64, 4), Program(4, 8, 64, 4), Program(4, 8, 64, 0))
# A single row of whole channels is loaded at once, and there is no second one: small programs, many of them.
REDUCE_ROW = (Program(4, 8, 64, 2), Program(4, 8, 64, 0))
# Elementwise programs have nothing to merge: small ones start and end more smoothly.
MAP = Program(4, 7, 72, 4)
# Activations take registers: corners (and signs) a few, curves, whose terms are all under way at once, many.
# By their cost in the table of activations [sass].
MAPS = (MAP, Program(4, 6, 80, 4), Program(4, 5, 96, 4))
REDUCE_CURVED = (Program(4, 3, 168, 8), *REDUCE[2:])
REDUCE_RUNS_ACTIVATED = (Program(8, 3, 80, 4), Program(4, 6, 80, 4), Program(4, 6, 80, 0))


def _cost(activation: str) -> int:
    return ACTIVATIONS[activation].cost if activation in ACTIVATIONS else 0


@dataclass(frozen=True)
class Sweep:
    """One kernel's walk over x."""

    view: View
    vec: int
    unroll: int  # U: loads in flight a thread and input
    group_rows: int  # R: rows that share a step, U * R rows a tile
    warps: int
    registers: int  # a thread, at most
    tiles: int  # of a block
    splits: int  # programs that share a block's tiles
    inputs: int  # tensors read
    itemsize: int
    reduces: bool
    samples: int = 1  # matrices like the view, one after another: 1 where cells span all samples
    group: int = 1  # channels a cell, where cells lie within a sample

    @cached_property
    def programs(self) -> int:
        return self.samples * self.view.blocks * self.splits

    @cached_property
    def counters(self) -> int:
        """Arrival counters: of each block, and of each sample."""
        return self.samples * (self.view.blocks + 1)

    @cached_property
    def tile(self) -> Tile:
        """What a program is compiled for."""
        v = self.view
        step = self.vec if v.mode == "planes" and v.inner % self.vec == 0 else 1
        walk = (v.mode, self.vec, self.unroll, self.group_rows, v.lanes, step)
        if not self.reduces:
            return Tile(*walk)
        return Tile(*walk, v.channels_a_block, self.fold, v.positions, self.merge, *self.members)

    @cached_property
    def members(self) -> tuple[int, int]:
        """(groups, channels of each) that the last program of a sample merges a step, as many values a thread
        as its registers hold."""
        values = (8 if self.registers >= 128 else 2) * WARP * self.warps
        members = min(power_of_two(self.group), values)
        return min(power_of_two(self.view.channels // self.group), values // members), members

    @cached_property
    def tile_rows(self) -> int:
        return self.unroll * self.group_rows

    @cached_property
    def merge(self) -> int:
        """Splits that the finalising program merges a step: 4 values a thread, so that loads overlap within
        64 registers.
        """
        return min(power_of_two(self.splits), max(1, 4 * WARP * self.warps // self.view.channels_a_block))

    @cached_property
    def fold(self) -> int:
        """Channels that a program sums over its lanes a step: as many as its registers hold the values of."""
        if self.view.mode == "rows":
            return self.view.lanes
        # beside eight loads, Triton 3.9 spills two registers at 4 [sass]
        values = 4 if self.registers >= 128 and self.unroll < 8 else 2
        return min(self.view.channels_a_block, max(1, values * WARP * self.warps // self.view.positions))

    @cached_property
    def geometry(self) -> Geometry:
        """Raises TooLarge where a size does not fit 32 bits."""
        v = self.view
        total = v.total if v.mode == "cycles" or self.samples > 1 else 0
        g = Geometry(
            v.rows, v.pitch // self.vec, v.width // self.vec, v.inner, v.channels,
            self.tiles, v.pieces, total // self.vec, v.blocks, self.splits,
            self.group, self.samples * v.channels // self.group,
        )  # fmt: skip
        # with the lanes that lie beyond the end, which are masked by what they count up to
        in_tile = self.tile_rows * (v.lanes if v.mode == "runs" else v.pitch) + v.lanes
        narrow = g._replace(total_v=0)  # the total is widened where it is used
        if max(*narrow, in_tile, self.programs, self.samples * v.channels * 6, self.partials) >= INT32:
            raise TooLarge(f"this tensor is too large for 32-bit tile offsets, grid or tables: {v}")
        return g

    @property
    def values(self) -> int:
        """What a program of a reduction finds of a channel: pivot, shift and M2; of x and dy two sums."""
        return 3 if self.inputs == 1 else 2

    @cached_property
    def partials(self) -> int:
        """Elements of the workspace that programs of a reduction hand to the last one: with pivots go counts,
        of each block."""
        counts = self.view.blocks if self.inputs == 1 else 0
        return self.samples * self.splits * (self.values * self.view.channels + counts)

    @cached_property
    def bytes_a_program(self) -> float:
        """Bytes one program has in flight when the loads of a tile, from all inputs, are issued together."""
        return self.inputs * self.tile_rows * self.view.lanes * self.itemsize * self.view.used

    @cached_property
    def tail_bytes(self) -> int:
        """What the last program of a block reads back: the part of a launch that a single SM does alone."""
        return self.splits * (3 * self.view.channels_a_block + 1) * max(4, self.itemsize)


def _reduce_view(n: int, c: int, s: int, itemsize: int, channels_last: bool, program: Program) -> View:
    lanes = program.warps * WARP * (VECTOR_BYTES // itemsize)
    if channels_last:
        rows = rows_view(n * s, c, itemsize)
        narrow = rows.vector(itemsize, True) * itemsize < VECTOR_BYTES
        return (cycles_view(n * s, c, itemsize, lanes) if narrow else None) or rows
    if s > 2 * lanes:
        return runs_view(n, c, s, lanes)
    return planes_view(n, c, s, itemsize, lanes if s <= lanes else 2 * lanes)


def _shape(view: View, itemsize: int, aligned: bool, inputs: int, program: Program) -> tuple[int, int, int]:
    """-> (vec, unroll, group) of a tile for a program of this size."""
    vectors = (
        program.warps * WARP * (VECTOR_BYTES // itemsize)
    )  # elements that one load of every thread brings
    group = 1
    if view.mode == "rows":
        group = min(max(1, vectors // view.lanes), power_of_two(view.rows))
    unroll = max(1, program.loads // inputs * vectors // max(vectors, group * view.lanes))
    limit = view.pieces if view.mode == "runs" else ceil_div(view.rows, group)
    vec = view.vector(itemsize, aligned)
    if vec * itemsize < VECTOR_BYTES:  # a step is several loads already
        unroll = 1
    return vec, min(unroll, floor_power_of_two(limit)), group


def _wasteful(view: View) -> bool:
    """Runs cut so that the last piece is mostly empty: a narrower tile does better."""
    return view.mode == "runs" and view.used < 0.85


def _evened(tiles: int, splits: int) -> int:
    """As few splits as give the same number of rounds, unless that idles too much of the GPU."""
    splits = max(1, min(tiles, splits))
    even = ceil_div(tiles, ceil_div(tiles, splits))
    return even if even >= 0.85 * splits else splits


def _fit(program: Program, vec: int, itemsize: int) -> Program:
    """fp64, and loads of single elements, need 128 registers."""
    if itemsize < 8 and vec * itemsize == VECTOR_BYTES:
        return program
    registers = max(128, program.registers)
    an_sm = min(program.an_sm, 65536 // (program.warps * WARP * registers))
    return Program(program.warps, an_sm, registers, program.loads)


def _warps(view: View, group: int, itemsize: int, program: Program) -> int:
    """No more warps than there are vectors in a step."""
    return max(1, min(program.warps, ceil_div(group * view.lanes * itemsize, VECTOR_BYTES * WARP)))


@lru_cache(maxsize=4096)
def reduce_sweep(
    x: Problem, inputs: int, samples: int = 1, group: int = 1, activation: str = "none"
) -> Sweep:
    """The plan of a kernel that reduces x, or `samples` times such an x, over n and s. activation: whose
    slope it takes on the way."""
    n, c, s, itemsize, channels_last, aligned, sms = x
    cost = _cost(activation)
    by_runs = REDUCE_RUNS_ACTIVATED if cost else REDUCE_RUNS
    otherwise = REDUCE if cost < 2 else REDUCE_CURVED
    runs = not channels_last and s > 2 * REDUCE[0].warps * WARP * (VECTOR_BYTES // itemsize)
    one_row = not channels_last and not runs and n == 1
    sweep = None
    for program in by_runs if runs else REDUCE_ROW if one_row else otherwise:
        view = _reduce_view(n, c, s, itemsize, channels_last, program)
        vec, unroll, group_rows = _shape(view, itemsize, aligned, inputs, program)
        program = _fit(program, vec, itemsize)
        tiles = ceil_div(view.rows, unroll * group_rows)
        splits = _evened(tiles, sms * program.an_sm // (view.blocks * samples))
        warps = _warps(view, group_rows, itemsize, program)
        sweep = Sweep(
            view, vec, unroll, group_rows, warps, program.registers, tiles, splits, inputs, itemsize, True,
            samples, group,
        )  # fmt: skip
        if tiles * view.blocks * samples >= sms * program.an_sm and not _wasteful(view):
            return sweep
    assert sweep is not None
    return sweep


@lru_cache(maxsize=4096)
def map_sweep(x: Problem, inputs: int, samples: int = 1, group: int = 1, activation: str = "none") -> Sweep:
    """The plan of a kernel that maps x, or `samples` times such an x, element by element with coefficients by
    channel. activation: which one it then applies, or the slope of."""
    n, c, s, itemsize, channels_last, aligned, sms = x
    vector, program = VECTOR_BYTES // itemsize, MAPS[_cost(activation)]
    lanes = MAP.warps * WARP * vector
    if channels_last:
        view = rows_view(n * s, c, itemsize)
        if view.vector(itemsize, True) * itemsize < VECTOR_BYTES:
            # a wide row may need a wide tile
            view = (
                cycles_view(n * s, c, itemsize, lanes) or cycles_view(n * s, c, itemsize, 4 * lanes) or view
            )
    elif s >= MAP.loads * lanes and s % vector == 0:
        view = runs_view(n, c, s, lanes)  # one channel a program: scalar coefficients
    else:
        # a single row has no second one to load meanwhile: a wider tile, if coefficients are by vector
        wider = MAP.loads // inputs if n == 1 and s % vector == 0 and aligned else 1
        view = strips_view(n, c, s, wider * lanes)
    vec, unroll, group_rows = _shape(view, itemsize, aligned, inputs, program)
    program = _fit(program, vec, itemsize)
    tiles = ceil_div(view.rows, unroll * group_rows)
    splits = _evened(tiles, ceil_div(sms * program.an_sm, view.blocks * samples))
    warps = _warps(view, group_rows, itemsize, MAP)
    return Sweep(
        view, vec, unroll, group_rows, warps, program.registers, tiles, splits, inputs, itemsize, False,
        samples, group,
    )  # fmt: skip


@dataclass(frozen=True)
class BatchNormPlan:
    """The four sweeps of a BatchNorm over x [n, c, s], and what a training step of it moves and launches."""

    statistics: Sweep
    transform: Sweep
    gradient_sums: Sweep
    gradient_transform: Sweep
    epilogue: EpiloguePlan = NO_EPILOGUE_PLAN
    forward_launches: int = 2
    backward_launches: int = 2

    @property
    def x_bytes(self) -> int:
        """T: the bytes of x."""
        return self.statistics.view.total * self.statistics.itemsize

    @property
    def forward_bytes(self) -> int:
        """x twice, y once, and the partials out and back; what follows adds its own. Tables of a few floats a
        channel are not counted.
        """
        more = self.epilogue.forward_bytes(self.statistics.view.total, self.statistics.itemsize)
        return 3 * self.x_bytes + more + 2 * self._partial_bytes(self.statistics)

    @property
    def backward_bytes(self) -> int:
        """dy and x twice, dx once, and the partials; what follows adds its own."""
        more = self.epilogue.backward_bytes(self.statistics.view.total, self.statistics.itemsize)
        return 5 * self.x_bytes + more + 2 * self._partial_bytes(self.gradient_sums)

    @staticmethod
    def _partial_bytes(sweep: Sweep) -> int:
        return sweep.partials * max(4, sweep.itemsize)


def batch_norm(
    n: int, c: int, s: int, itemsize: int, channels_last: bool, sms: int = 132, aligned: bool = True,
    epilogue: EpiloguePlan = NO_EPILOGUE_PLAN,
) -> BatchNormPlan:  # fmt: skip
    """n, c, s: batch, channels, spatial positions (1 for 2-D input). itemsize: bytes an element of x.
    channels_last: C is the fastest dimension (2-D input counts as that). aligned: every tensor starts on 16
    bytes. sms: of the GPU. epilogue: what follows, from EpiloguePlan.of."""
    x = Problem(n, c, s, itemsize, channels_last, aligned, sms)
    return BatchNormPlan(
        reduce_sweep(x, 1),
        map_sweep(x, 1 + epilogue.residual, activation=epilogue.activation),
        reduce_sweep(x, 2 + (epilogue.kept == "residual"), activation=epilogue.activation),
        map_sweep(x, 2, activation=epilogue.activation_of_dx),
        epilogue,
    )
