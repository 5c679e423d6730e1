"""Sizes -> the launches of a GroupNorm, and the bytes that a training step moves. InstanceNorm is GroupNorm
with as many groups as channels. Pure Python, as plan.py.

n, c, s, itemsize, channels_last, aligned and sms are those of batch_plan.batch_norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from .epilogue import ACTIVATIONS, NO_EPILOGUE_PLAN, SMOOTH, EpiloguePlan
from .plan import INT32, WARP, PassPlan, StepPlan, plan_elementwise, plan_reduction
from .records import GroupGeometry, OnePassTile, Problem
from .views import VECTOR_BYTES, ceil_div, floor_power_of_two, power_of_two

# By the number of inputs: the tiles of each that a program can hold without spills, in 128 registers a
# thread [sass, all Tritons]. With 16 warps that is 80 KB of x, or 40 KB each of x and dy. Slopes of smooth
# activations need registers of their own, as fp64 does.
ONE_PASS_TILES = {1: 10, 2: 5}
ONE_PASS_TILES_OF_SMOOTH = 4
ONE_PASS_TILES_WITH_BITS = 9  # of relu's mask, which a forward writes


def _most_tiles(inputs: int, itemsize: int, activation: str, kept: str) -> int:
    smooth = activation != "none" and ACTIVATIONS[activation].cost == SMOOTH
    if inputs > 1 and (smooth or itemsize == 8):
        return ONE_PASS_TILES_OF_SMOOTH
    return ONE_PASS_TILES_WITH_BITS if inputs == 1 and kept == "bits" else ONE_PASS_TILES[inputs]


@dataclass(frozen=True)
class OnePassPlan:
    """One launch of a kernel that keeps whole groups in registers."""

    tile: OnePassTile
    geometry: GroupGeometry
    warps: int
    inputs: int
    itemsize: int
    registers: int = 128
    handed: ClassVar[int] = 0  # to other programs: see PassPlan

    @cached_property
    def programs(self) -> int:
        return ceil_div(self.geometry.groups, self.tile.groups)

    @cached_property
    def bytes_per_program(self) -> int:
        """Bytes that a program has in flight: everything that it keeps."""
        g, t = self.geometry, self.tile
        elements: int = t.groups * g.group_size * g.inner_v * t.vec
        return self.inputs * elements * self.itemsize


@lru_cache(maxsize=4096)
def plan_one_pass(
    samples: int, groups: int, group_size: int, inner: int, itemsize: int, aligned: bool, inputs: int,
    activation: str = "none", kept: str = "",
) -> OnePassPlan | None:  # fmt: skip
    """The plan for `samples` times `groups` contiguous groups of group_size channels of `inner` positions, of
    `inputs` tensors each. None: a group is too large, or would leave too much of its tiles empty."""
    vec = VECTOR_BYTES // itemsize if aligned else 1
    while inner % vec:
        vec //= 2
    all_groups, span = samples * groups, ceil_div(inner, vec)
    if all_groups * group_size * 2 >= INT32:
        return None
    load_bytes = max(4, vec * itemsize)  # bytes of registers that a load takes
    most = _most_tiles(inputs, itemsize, activation, kept)
    if load_bytes < VECTOR_BYTES:  # more addresses for the same bytes
        most = most * 3 // 4 * VECTOR_BYTES // load_bytes
    for warps in (4, 8, 16):
        threads = warps * WARP
        padded = power_of_two(span)
        if padded >= threads:  # a channel is one tile or several
            per_program, channels, width = 1, 1, threads
            pieces = ceil_div(span, threads)
            tiles = pieces * group_size
        else:
            width, pieces = padded, 1
            channels = min(power_of_two(group_size), threads // padded)
            tiles = ceil_div(group_size, channels)
            per_program = 1
            if tiles == 1:
                per_program = min(max(1, threads // (channels * padded)), power_of_two(all_groups))
        if tiles <= most:
            needed = max(1, per_program * channels * width // WARP)
            tile = OnePassTile(vec, per_program, channels, width, pieces, tiles)
            geometry = GroupGeometry(all_groups, group_size, inner // vec, groups)
            return OnePassPlan(tile, geometry, min(warps, floor_power_of_two(needed)), inputs, itemsize)
    return None


def one_pass(
    x: Problem, groups: int, inputs: int, activation: str = "none", kept: str = ""
) -> OnePassPlan | None:
    """The plan of one launch which reads each of `inputs` tensors once (1: forward, 2: backward). None: a
    group does not fit in a program's registers, or is not one run of memory, and is read twice. kept: what
    the backward reads of a residual (see EpiloguePlan); a program has no registers for a third tensor."""
    if x.channels_last and x.s > 1:
        return None
    if inputs > 1 and kept == "residual":
        return None
    plan = plan_one_pass(x.n, groups, x.c // groups, x.s, x.itemsize, x.aligned, inputs, activation, kept)
    # a vector's bits of relu's mask are one byte
    return None if plan is not None and kept == "bits" and plan.tile.vec != 8 else plan


def two_pass(
    make: Callable[..., PassPlan], x: Problem, groups: int, by_group: bool, inputs: int,
    activation: str = "none",
) -> PassPlan:  # fmt: skip
    """The plan of one of two passes, made by plan.plan_reduction or plan.plan_elementwise. by_group:
    contiguous groups are treated as channels, since each is one run of memory."""
    if by_group:
        seen, group_size = x._replace(n=1, c=groups, s=x.c // groups * x.s), 1
    else:
        seen, group_size = x._replace(n=1), x.c // groups
    return make(seen, inputs, x.n, group_size, activation)


def group_norm(
    n: int, c: int, s: int, groups: int, itemsize: int, channels_last: bool,
    sms: int = 132, aligned: bool = True, epilogue: EpiloguePlan = NO_EPILOGUE_PLAN,
) -> StepPlan:  # fmt: skip
    channels_last = channels_last or s == 1
    x = Problem(n, c, s, itemsize, channels_last, aligned, sms)

    def plan(make: Callable[..., PassPlan], *how: Any) -> PassPlan:
        return two_pass(make, x, groups, *how)

    held = (
        one_pass(x, groups, 1, kept=epilogue.kept),
        one_pass(x, groups, 2, epilogue.activation, epilogue.kept),
    )
    forward = (
        (held[0],)
        if held[0]
        else (
            plan(plan_reduction, not channels_last, 1, "none"),
            plan(plan_elementwise, False, 1 + epilogue.residual, epilogue.activation),
        )
    )
    backward = (
        (held[1],)
        if held[1]
        else (
            plan(plan_reduction, False, 2 + (epilogue.kept == "residual"), epilogue.activation),
            plan(plan_elementwise, False, 2, epilogue.activation_of_dx),
        )
    )
    return StepPlan(n * c * s, itemsize, forward, backward, epilogue, stats=2 * n * groups, sums=2 * n * c)
