"""Sizes -> the plan of BatchNorm in one launch, a program for each few whole channels, where that takes less
time than two launches. Pure Python, as plan.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import inf
from typing import NamedTuple

from .plan import (
    MERGE_STEP,
    TILE,
    WARP,
    PassPlan,
    Program,
    cost_of,
    fitted,
    plan_reduction,
    reducing,
)
from .records import Problem
from .views import VECTOR_BYTES, ceil_div, nchw_view, nchw_whole_view, power_of_two

# What launches wait for, in microseconds, beside TILE and MERGE_STEP, and rates in bytes a microsecond. All
# are assumptions, those of benchmarks/model.py.
GAP = 1.5  # from one launch to the next, with the atomic of the last program
FOLD = 0.4  # lanes to channels, and the coefficients through L2
COPY_RATE, L2_RATE, SM_RATE = 4.3e6, 5.5e6, 64e3  # of memory, of L2, and what one SM gets of either
ISSUED = 4 * 1755  # instructions of warps that an SM issues in a microsecond
L2_BYTES = 30e6  # that are still there when they are read again
# 128 registers a thread, and 16 warps an SM: as many as there are registers for.
WARPS = (8, 4, 2, 1, 16)
# Loads that a thread has in flight; fewer where a program that keeps its tile has much to do with it: adds a
# residual, computes a smooth activation, or gathers the lanes of more than two channels [sass].
LOADS, FEW_LOADS = 8, 4
CHANNELS = (1, 2, 4, 8)  # of a program, at most


class Pass(NamedTuple):
    """One direction of a training step.

    inputs: the tensors that are read for sums and then for results: x, and in a backward dy. first: those
    that are read for the sums. once: what is moved once, in multiples of x. activation: whose slope is
    computed for the sums. packed: whether relu's mask is moved, whose bytes must each belong to one block.
    heavy: what is done to an element takes many registers."""

    inputs: int
    first: int
    once: float
    activation: str
    packed: bool
    heavy: bool

    @classmethod
    def forward(cls, activation: str, residual: bool, mask: bool) -> Pass:
        return cls(1, 1, 1 + residual, "none", mask, residual or cost_of(activation) > 1)

    @classmethod
    def backward(cls, activation: str, kept: str) -> Pass:
        """kept: as EpiloguePlan's."""
        once = {"": 1, "residual": 3, "mask": 2}[kept]
        return cls(2, 2 + (kept == "residual"), once, activation, kept == "mask", cost_of(activation) > 1)


def _plans(x: Problem, p: Pass) -> Iterator[tuple[PassPlan, int]]:
    """Those with whole channels."""
    for warps, channels in itertools.product(WARPS, CHANNELS):
        program = Program(warps, 16 // warps, 128, FEW_LOADS if p.heavy or channels > 2 else LOADS)
        lanes = warps * WARP * VECTOR_BYTES // x.itemsize
        if channels > 1 and (channels > x.c or channels * power_of_two(x.s) > 4 * warps * WARP):
            continue
        if x.s > 2 * lanes:
            view = nchw_view(x.n, x.c, x.s, lanes)
        else:
            view = nchw_whole_view(x.n, x.c, x.s, channels)
        if p.packed and (view.width % 8 or view.pitch % 8):
            continue
        tile, warps, registers, per_sm, tiles = fitted(x, view, program, p.first, True)
        tile = replace(reducing(tile, view, warps, registers, 1, 1), held=tiles == 1)
        yield PassPlan(view, tile, warps, registers, tiles, 1, p.first, x.itemsize), per_sm


def _again(x: Problem, p: Pass, cached: float) -> float:
    """Microseconds of the part that writes results. cached: the bytes of inputs that it finds in L2."""
    memory = x.bytes * (p.inputs + p.once) - cached
    return max(memory / COPY_RATE, x.bytes * (p.inputs + p.once) / L2_RATE)


def _one_launch(plan: PassPlan, per_sm: int, x: Problem, p: Pass) -> float:
    """Microseconds. Infinity if programs would have to read x from memory again."""
    blocks, held = plan.view.blocks, plan.tile.held
    turns = ceil_div(blocks, x.sms * per_sm)
    if not held and min(blocks, x.sms * per_sm) / blocks * p.inputs * x.bytes > L2_BYTES:
        return inf
    channels, tile = plan.tile.channels, plan.tile
    fold = FOLD * min(channels, 3)
    of_thread = plan.tiles * tile.tile_rows * tile.lanes / (plan.warps * WARP)
    loads = VECTOR_BYTES // (tile.vec * x.itemsize)
    instructions = of_thread * (p.inputs * (9 + 4 * loads) + p.heavy * 12) + (150 if channels == 1 else 400)
    issuing = ceil_div(blocks, x.sms) * plan.warps * instructions / ISSUED
    second = x.bytes * p.once / COPY_RATE if held else _again(x, p, p.inputs * x.bytes)
    streaming = p.inputs * x.bytes / COPY_RATE + second
    waiting = turns * (plan.tiles * TILE * (1 if held else 1.5) + fold)
    of_sm = ceil_div(blocks, x.sms) * x.bytes / blocks * (p.inputs * (1 if held else 2) + p.once)
    return max(streaming + fold, waiting, of_sm / SM_RATE + fold, issuing)


def _two_launches(x: Problem, p: Pass) -> float:
    """Microseconds."""
    sums = plan_reduction(x, p.first, activation=p.activation)
    steps = ceil_div(sums.splits, sums.tile.partials_per_iter)
    first = max(p.inputs * x.bytes / COPY_RATE, ceil_div(sums.tiles, sums.splits) * TILE)
    second = max(_again(x, p, min(L2_BYTES, p.inputs * x.bytes)), TILE)
    return first + steps * MERGE_STEP + GAP + second


@lru_cache(maxsize=4096)
def plan_whole(x: Problem, p: Pass) -> PassPlan | None:
    """None: two launches take less time."""
    if x.channels_last:
        return None
    best = min(_plans(x, p), key=lambda each: _one_launch(*each, x, p), default=None)
    if best is None or _one_launch(*best, x, p) > _two_launches(x, p):
        return None
    return best[0]
