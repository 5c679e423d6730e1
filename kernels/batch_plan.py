"""Sizes -> the launches of a BatchNorm: one, with a program for each few whole channels, where that takes
less time than two (see whole_channels.py). Pure Python, as plan.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import ClassVar, NamedTuple

from .epilogue import NO_EPILOGUE_PLAN, EpiloguePlan
from .plan import (
    MERGE_STEP,
    TILE,
    WARP,
    PassPlan,
    Program,
    StepPlan,
    cost_of,
    fitted,
    plan_elementwise,
    plan_reduction,
    reducing,
)
from .records import Problem
from .views import VECTOR_BYTES, View, ceil_div, nchw_view, nchw_whole_view, nhwc_view, power_of_two

# What launches wait for, in microseconds, beside TILE and MERGE_STEP; rates in bytes a microsecond, and sizes
# in bytes. All are assumptions for an H200, about those of benchmarks/model.py.
GAP = 1.5  # from one launch to the next, with the atomic of the last program
QUEUED = 1.0  # a load while memory is busy
FOLD = 0.4  # lanes to one channel, and the coefficients through L2; more channels take longer
MEMORY_RATE, L2_RATE = 33e3, 42e3  # an SM's share of what memory and L2 give
SM_RATE = 64e3  # what one SM gets of either, if others take little
CACHED = 227e3  # an SM's share of what is still in L2 when it is read again
ISSUED = 4 * 1755  # instructions of warps that an SM issues in a microsecond
# 128 registers a thread, and 16 warps an SM: as many as there are registers for.
WARPS = (8, 4, 2, 1, 16)
# Loads that a thread has in flight; fewer where a program that keeps its tile has much to do with it: adds a
# residual, computes a smooth activation, or compares or gathers the lanes of several channels. With a channel
# in each lane there are no registers to keep a tile [sass].
LOADS, FEW_LOADS = 8, 4
BYTE = 0.5  # of an element of 16 bits
CHANNELS = (1, 2, 4, 8)  # of a contiguous program, at most
ROW_BYTES = (64, 32)  # of the channels of a channels_last program: whole sectors, few enough to finalize


class Pass(NamedTuple):
    """One direction of a training step.

    inputs: the tensors that are read for sums and then for results: x, and in a backward dy. first: those
    that are read for the sums. once: what is moved once, in multiples of x. activation: whose slope is
    computed for the sums. heavy: what is done to an element takes many registers."""

    inputs: int
    first: int
    once: float
    activation: str
    heavy: bool

    @classmethod
    def forward(cls, epilogue: EpiloguePlan) -> Pass:
        residual = epilogue.residual
        once = 1 + residual + BYTE * (epilogue.mask == "bytes")
        heavy = residual or cost_of(epilogue.activation) > 1
        return cls(1, 1, once, "none", heavy)

    @classmethod
    def backward(cls, epilogue: EpiloguePlan) -> Pass:
        kept, activation = epilogue.kept, epilogue.activation
        once = {"": 1.0, "residual": 3.0, "bits": 2.0, "bytes": 2 + BYTE}[kept]
        return cls(2, 2 + (kept == "residual"), once, activation, cost_of(activation) > 1)


@dataclass(frozen=True)
class WholePlan(PassPlan):
    """A pass whose programs have whole channels. per_sm: programs that share an SM."""

    per_sm: int = 1
    handed: ClassVar[int] = 0  # to other programs


def _views(x: Problem, p: Pass, warps: int) -> Iterator[tuple[View, int, bool]]:
    """Those whose blocks are whole channels, with the loads that a thread may have in flight, and whether it
    may then keep its tile."""
    vector = VECTOR_BYTES // x.itemsize
    if x.channels_last:
        for size in ROW_BYTES if x.c % vector == 0 else ():
            lanes = size // x.itemsize
            if 8 <= lanes <= power_of_two(x.c):  # whole bytes of relu's mask, which has bits
                yield nhwc_view(x.n * x.s, x.c, x.itemsize, lanes), FEW_LOADS, False
    elif x.s > 2 * warps * WARP * vector:
        yield nchw_view(x.n, x.c, x.s, warps * WARP * vector), LOADS, True
    else:
        for channels in CHANNELS:
            # more than that would be reduced in several steps
            if channels == 1 or (channels <= x.c and channels * power_of_two(x.s) <= 4 * warps * WARP):
                view, simple = nchw_whole_view(x.n, x.c, x.s, channels), channels * p.inputs <= 2
                yield view, LOADS if simple else FEW_LOADS, True
                if channels == 2 and not simple:
                    yield view, LOADS, False


def _plans(x: Problem, p: Pass) -> Iterator[WholePlan]:
    for most in WARPS:
        for view, loads, keeps in _views(x, p, most):
            program = Program(most, 16 // most, 128, FEW_LOADS if p.heavy else loads)
            tile, warps, registers, per_sm, tiles = fitted(x, view, program, p.first, True)
            tile = replace(reducing(tile, view, warps, registers, 1), held=keeps and tiles == 1)
            yield WholePlan(
                view, tile, warps, registers, tiles, 1, p.first, x.itemsize, per_sm=per_sm
            )  # fmt: skip


def _again(x: Problem, p: Pass, cached: float) -> float:
    """Microseconds of the part that writes results. cached: the bytes of inputs that it finds in L2."""
    moved = x.bytes * (p.inputs + p.once)
    return max((moved - cached) / (MEMORY_RATE * x.sms), moved / (L2_RATE * x.sms))


def _one_launch(plan: WholePlan, x: Problem, p: Pass) -> tuple[float, bool, float]:
    """Microseconds, and what decides between plans that take as many. Infinity if programs would have to read
    x from memory again."""
    tile, blocks, memory = plan.tile, plan.view.blocks, MEMORY_RATE * x.sms
    of_sm, turns = ceil_div(blocks, x.sms), ceil_div(blocks, x.sms * plan.per_sm)
    if not tile.held and p.inputs * x.bytes / blocks * min(of_sm, plan.per_sm) > CACHED:
        return inf, False, inf
    fold = FOLD * (2 if x.channels_last else tile.channels.bit_length())
    second = x.bytes * p.once / memory if tile.held else _again(x, p, p.inputs * x.bytes)
    if turns * plan.tiles > 1:  # these load and compute in turns, so that loads wait behind others
        memory = min(memory, x.sms * plan.bytes_per_program * min(of_sm, plan.per_sm) / QUEUED)
    streaming = p.inputs * x.bytes / memory + second
    waiting = turns * (plan.tiles * TILE * (1 if tile.held else 1.5) + fold)
    of_block = x.bytes / blocks * (p.inputs * (1 if tile.held else 2) + p.once)
    # fewer lines that a load of a warp has to look up
    rate = SM_RATE * min(1, tile.lanes * x.itemsize / 64) if x.channels_last else SM_RATE
    of_thread = plan.tiles * tile.tile_rows * tile.lanes / (plan.warps * WARP)
    loads = VECTOR_BYTES // (tile.vec * x.itemsize)
    instructions = of_thread * (10 * p.inputs + 3.5 * loads + 12 * p.heavy) + 150 * min(tile.channels, 3)
    issuing = of_sm * plan.warps * instructions / ISSUED
    time = max(streaming + fold, waiting, of_sm * of_block / rate + fold, issuing)
    # Of plans that wait as long, the one that issues least, unless a thread has more loads than it issues
    # before it waits for the first [sass].
    return time, of_thread * p.inputs / tile.vec > LOADS, issuing


def _two_launches(x: Problem, p: Pass) -> float:
    """Microseconds."""
    sums = plan_reduction(x, p.first, activation=p.activation)
    steps = ceil_div(sums.splits, sums.tile.partials_in_flight)
    first = max(p.inputs * x.bytes / (MEMORY_RATE * x.sms), ceil_div(sums.tiles, sums.splits) * TILE)
    second = max(_again(x, p, min(CACHED * x.sms, p.inputs * x.bytes)), TILE)
    return first + steps * MERGE_STEP + GAP + second


@lru_cache(maxsize=4096)
def plan_whole(x: Problem, p: Pass) -> WholePlan | None:
    """None: two launches take less time."""
    times = {plan: _one_launch(plan, x, p) for plan in _plans(x, p)}
    best = min(times, key=times.__getitem__, default=None)
    return None if best is None or times[best][0] > _two_launches(x, p) else best


def batch_norm(
    n: int, c: int, s: int, itemsize: int, channels_last: bool, sms: int = 132, aligned: bool = True,
    epilogue: EpiloguePlan = NO_EPILOGUE_PLAN,
) -> StepPlan:  # fmt: skip
    """n, c, s: batch, channels, spatial positions (1 for 2-D input). itemsize: bytes of an element of x.
    channels_last: C is the fastest dimension, as it is in 2-D input. aligned: every tensor starts on 16
    bytes. sms: the GPU's number of SMs. epilogue: from EpiloguePlan.of."""
    x = Problem(n, c, s, itemsize, channels_last, aligned, sms)
    forward = (
        plan_reduction(x, 1),
        plan_elementwise(x, 1 + epilogue.residual, activation=epilogue.activation),
    )
    backward = (
        plan_reduction(x, 2 + (epilogue.kept == "residual"), activation=epilogue.activation),
        plan_elementwise(x, 2, activation=epilogue.activation_of_dx),
    )
    whole = [plan_whole(x, each(epilogue)) for each in (Pass.forward, Pass.backward)]
    either: list[tuple[PassPlan, ...]] = [
        (one,) if one else two for one, two in zip(whole, (forward, backward), strict=True)
    ]
    return StepPlan(n * c * s, itemsize, either[0], either[1], epilogue)
