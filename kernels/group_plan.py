"""Sizes -> the launches of a GroupNorm, and the bytes that a training step moves. InstanceNorm is GroupNorm
with as many groups as channels. Pure Python, as plan.py.

n, c, s, itemsize, channels_last, aligned and sms are those of plan.batch_norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .epilogue import NO_EPILOGUE_PLAN, EpiloguePlan
from .plan import INT32, WARP, PassPlan, plan_elementwise, plan_reduction
from .records import GroupGeometry, OnePassTile, Problem
from .views import VECTOR_BYTES, ceil_div, floor_power_of_two, power_of_two

# By the number of inputs: the tiles of each that a program can hold without spills, in 128 registers a
# thread [sass, all Tritons]. With 16 warps that is 64 KB of x (80 KB where a tile is one channel), or 32 KB
# each of x and dy.
ONE_PASS_TILES = {1: 8, 2: 4}
ONE_PASS_TILES_OF_ONE_CHANNEL = {1: 10, 2: 4}


@dataclass(frozen=True)
class OnePassPlan:
    """One launch of a kernel that keeps whole groups in registers."""

    tile: OnePassTile
    geometry: GroupGeometry
    warps: int
    inputs: int
    itemsize: int
    registers: int = 128

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
    samples: int, groups: int, group_size: int, inner: int, itemsize: int, aligned: bool, inputs: int
) -> OnePassPlan | None:
    """The plan for `samples` times `groups` contiguous groups of group_size channels of `inner` positions, of
    `inputs` tensors each. None: a group is too large, or would leave too much of its tiles empty."""
    vec = VECTOR_BYTES // itemsize if aligned else 1
    while inner % vec:
        vec //= 2
    all_groups, span = samples * groups, ceil_div(inner, vec)
    if all_groups * group_size * 2 >= INT32:
        return None
    load_bytes = max(4, vec * itemsize)  # bytes of registers that a load takes
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
        one_channel = channels == per_program == 1
        most = (ONE_PASS_TILES_OF_ONE_CHANNEL if one_channel else ONE_PASS_TILES)[inputs]
        if load_bytes < VECTOR_BYTES:  # more addresses for the same bytes
            most = most * 3 // 4 * VECTOR_BYTES // load_bytes
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
    the backward reads of a residual, "residual", "mask" or ""."""
    if x.channels_last and x.s > 1:
        return None
    # dy times any other slope is kept in full precision, which takes more registers than there are [sass]
    if inputs > 1 and activation != "none" and (activation not in ("relu", "relu6") or kept == "residual"):
        return None
    plan = plan_one_pass(x.n, groups, x.c // groups, x.s, x.itemsize, x.aligned, inputs)
    # a vector's bits of relu's mask are one byte
    return None if plan is not None and kept == "mask" and plan.tile.vec != 8 else plan


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


@dataclass(frozen=True)
class GroupNormPlan:
    """The launches of a training step over x [n, c, s] and the bytes it moves, where all gradients are
    wanted. forward and backward are each one launch, or two passes. The backward has one launch more, which
    sums the parameters' gradients over samples."""

    n: int
    c: int
    s: int
    groups: int
    itemsize: int
    forward: OnePassPlan | tuple[PassPlan, PassPlan]
    backward: OnePassPlan | tuple[PassPlan, PassPlan]
    epilogue: EpiloguePlan = NO_EPILOGUE_PLAN

    @property
    def forward_launches(self) -> int:
        return 1 if isinstance(self.forward, OnePassPlan) else 2

    @property
    def backward_launches(self) -> int:
        return 2 if isinstance(self.backward, OnePassPlan) else 3

    @property
    def x_bytes(self) -> int:
        """T: the bytes of x."""
        return self.n * self.c * self.s * self.itemsize

    @property
    def forward_bytes(self) -> int:
        """x once, or twice and the partial results of the passes; y once; the statistics of all groups,
        written, and read by the second pass; and the epilogue's bytes. Weight and bias are not counted, nor
        are statistics that several programs read."""
        more = self.epilogue.forward_bytes(self.n * self.c * self.s, self.itemsize)
        if isinstance(self.forward, OnePassPlan):
            return 2 * self.x_bytes + more + self._stats_bytes
        return 3 * self.x_bytes + more + 2 * self._partial_bytes(self.forward[0]) + 2 * self._stats_bytes

    @property
    def backward_bytes(self) -> int:
        """dy and x once, or twice and the partial results of the passes; dx once; the forward's statistics,
        and for two passes the coefficients of dx, out and back; each sample's sums for weight and bias, out
        and back; and the epilogue's bytes."""
        sums = 2 * 2 * self.n * self.c * self._wide
        sums += self.epilogue.backward_bytes(self.n * self.c * self.s, self.itemsize)
        if isinstance(self.backward, OnePassPlan):
            return 3 * self.x_bytes + self._stats_bytes + sums
        return 5 * self.x_bytes + 2 * self._partial_bytes(self.backward[0]) + 3 * self._stats_bytes + sums

    @property
    def _wide(self) -> int:
        """Bytes of a number in the accumulator's type."""
        return max(4, self.itemsize)

    @property
    def _stats_bytes(self) -> int:
        """Two numbers for each group."""
        return 2 * self.n * self.groups * self._wide

    def _partial_bytes(self, plan: PassPlan) -> int:
        """Each program's partial results, and those of channels that are merged to groups."""
        merged = plan.samples * plan.values * plan.view.channels if plan.group_size > 1 else 0
        return (plan.partials + merged) * self._wide


def group_norm(
    n: int, c: int, s: int, groups: int, itemsize: int, channels_last: bool,
    sms: int = 132, aligned: bool = True, epilogue: EpiloguePlan = NO_EPILOGUE_PLAN,
) -> GroupNormPlan:  # fmt: skip
    channels_last = channels_last or s == 1
    x = Problem(n, c, s, itemsize, channels_last, aligned, sms)

    def plan(make: Callable[..., PassPlan], by_group: bool, inputs: int, activation: str) -> PassPlan:
        return two_pass(make, x, groups, by_group, inputs, activation)

    forward = one_pass(x, groups, 1, kept=epilogue.kept) or (
        plan(plan_reduction, not channels_last, 1, "none"),
        plan(plan_elementwise, False, 1 + epilogue.residual, epilogue.activation),
    )
    backward = one_pass(x, groups, 2, epilogue.activation, epilogue.kept) or (
        plan(plan_reduction, False, 2 + (epilogue.kept == "residual"), epilogue.activation),
        plan(plan_elementwise, False, 2, epilogue.activation_of_dx),
    )
    return GroupNormPlan(n, c, s, groups, itemsize, forward, backward, epilogue)
