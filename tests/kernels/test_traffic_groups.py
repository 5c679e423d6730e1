"""What GroupNorm's and InstanceNorm's kernels do to memory, counted in the interpreter."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bnfast.checks import cases
from bnfast.functional import instance_norm
from bnfast.kernels.group_plan import GroupNormPlan, group_norm
from tests.support import kernel_calls as kernels
from tests.support.trace import Trace, clean, trace

pytestmark = pytest.mark.usefixtures("several_programs")
SMS = 3  # the fixture's
FP16, FP32 = torch.float16, torch.float32


class Given(NamedTuple):
    x: Tensor
    dy: Tensor
    groups: int
    weight: Tensor | None
    bias: Tensor | None


def given(shape: tuple[int, ...], groups: int, dtype: torch.dtype, last: bool = False) -> Given:
    g = cases.given(cases.group_norm(shape, dtype, last, groups=groups), torch.device("cpu"))
    return Given(g.x, g.dy, groups, g.weight, g.bias)


def written_once(t: Trace, *results: Tensor | None) -> None:
    for result in results:
        assert result is not None
        assert t.of(result).unique_written == t.of(result).size


DATA, TABLES = ("x", "y", "dy", "dx", "partials", "sums"), ("table", "gradients")


def moved(t: Trace) -> int:
    """Bytes as a plan counts them: all of data and of what programs hand over; of tables, which many programs
    read, each value once out and once in."""
    tables = [t[f"{name}_ptr"] for name in TABLES if f"{name}_ptr" in t.traffic]
    return t.moved(*DATA) + sum(table.unique_read + table.unique_written for table in tables)


def planned(g: Given) -> GroupNormPlan:
    n, c, *size = g.x.shape
    s = torch.Size(size).numel()
    return group_norm(n, c, s, g.groups, g.x.element_size(), not g.x.is_contiguous(), sms=SMS)


def forward(g: Given, reads: float, launches: int) -> tuple[Trace, Tensor]:
    with trace(x=g.x) as t:
        y, table, _ = kernels.group_norm(g.x, g.groups, g.weight, g.bias)
    clean(t)
    assert t.launches <= launches
    assert (t["x"].reads, t["x"].writes, t.of(y).writes, t.of(y).reads) == (reads, 0.0, 1.0, 0.0)
    written_once(t, y, table)
    assert y.stride() == g.x.stride()
    plan = planned(g)
    assert (t.launches, moved(t)) == (plan.forward_launches, plan.forward_bytes)
    return t, table


def backward(g: Given, table: Tensor, reads: float, launches: int) -> Trace:
    with trace(x=g.x, dy=g.dy) as b:
        dx, dweight, dbias, _ = kernels.group_norm_backward(g.x, g.dy, table, g.groups, g.weight)
    assert dx is not None
    clean(b)
    assert b.launches <= launches
    assert b["x"].reads <= reads
    assert b["dy"].reads <= reads
    assert (b["x"].writes, b.of(dx).writes, b.of(dx).reads) == (0.0, 1.0, 0.0)
    written_once(b, dx, dweight, dbias)
    assert dx.stride() == g.x.stride()
    plan = planned(g)
    assert (b.launches, moved(b)) == (plan.backward_launches, plan.backward_bytes)
    return b


# channels, positions and groups; with them, whether a backward holds x and dy as well
HELD = [
    ((8, 24, 7, 7), 3, True),
    ((2, 64, 14, 14), 8, True),
    ((2, 20, 28, 28), 2, True),
    ((5, 13, 3, 4), 13, True),
    ((40, 16, 2, 2), 4, True),
    ((4, 3, 15, 15), 1, True),
    ((33, 65, 1, 1), 5, True),
    ((2, 2, 3, 5, 7), 1, True),
    ((1, 2, 110, 110), 1, False),
]


@pytest.mark.parametrize(("shape", "groups", "both"), HELD, ids=str)
def test_held_cells(shape: tuple[int, ...], groups: int, both: bool) -> None:
    """Forward: one launch, x once, y once. Backward: dy and x once, dx once, and one launch more for the
    parameters."""
    g = given(shape, groups, FP16)
    t, table = forward(g, 1.0, 1)
    b = backward(g, table, 1.0 if both else 2.0, 2 if both else 3)
    if shape[2:].count(7) == 0 and torch.Size(shape[2:]).numel() % 16 == 0:
        assert min(t["x"].read_efficiency, b["dy"].read_efficiency) >= 0.97


LARGE = [((1, 4, 160, 160), 2, FP32), ((1, 6, 75, 149), 2, FP32), ((1, 2, 180, 180), 1, FP16)]


@pytest.mark.parametrize(("shape", "groups", "dtype"), LARGE, ids=str)
def test_cells_too_large_to_hold(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    """Forward: x twice. Backward: dy and x twice."""
    g = given(shape, groups, dtype)
    _, table = forward(g, 2.0, 3)
    backward(g, table, 2.0, 3)


ROWS = [
    ((2, 320, 6, 6), 32),
    ((3, 40, 8, 8), 4),
    ((2, 130, 4, 4), 2),
    ((2, 96, 5, 5), 96),
    ((1, 64, 9, 9), 8),
    ((2, 9, 5, 5), 3),
    ((2, 16, 3, 4, 5), 4),
]


@pytest.mark.parametrize(("shape", "groups"), ROWS, ids=str)
def test_channels_last(shape: tuple[int, ...], groups: int) -> None:
    """x twice, whole sectors: a group of 10 channels is no multiple of one, and must cost no more."""
    g = given(shape, groups, FP16, last=True)
    t, table = forward(g, 2.0, 3)
    b = backward(g, table, 2.0, 3)
    if shape[1] % 8 == 0:
        flows = [t["x"].read_efficiency, b["x"].read_efficiency, b["dy"].read_efficiency]
        assert min(flows) >= 0.95


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (2, 4, 3, 4, 5)], ids=str)
def test_instance_norm_keeps_the_memory_format(shape: tuple[int, ...]) -> None:
    """In both directions, where torch copies to contiguous and back: nothing but the kernels touches x."""
    g = given(shape, shape[1], FP16, last=True)
    x = g.x.requires_grad_()
    with trace(x=x) as t:
        y = instance_norm(x, weight=g.weight, bias=g.bias)
    clean(t, 2)
    assert t["x"].reads == 2.0
    assert y.stride() == x.stride()
    with trace(x=x, dy=g.dy) as b:
        (dx,) = torch.autograd.grad(y, x, g.dy)
    clean(b, 2)
    assert (b["x"].reads, b["dy"].reads, b.of(dx).writes) == (2.0, 2.0, 1.0)
    assert dx.stride() == x.stride()


@pytest.mark.parametrize(
    ("shape", "groups", "held"),
    [((2, 12, 6, 6), 3, True), ((2, 40, 6, 6), 4, False), ((2, 8, 6, 6), 8, False)],
)
def test_only_what_is_wanted(shape: tuple[int, ...], groups: int, held: bool) -> None:
    """Without dx one sweep; without parameters no launch for them."""
    g = given(shape, groups, FP16, last=not held)
    _, table = forward(g, 1.0 if held else 2.0, 3)
    for need_dx, kind in ((True, None), (False, FP32)):
        with trace(x=g.x, dy=g.dy) as b:
            kernels.group_norm_backward(g.x, g.dy, table, groups, g.weight, (need_dx, kind, kind))
        clean(b)
        assert b.launches <= 2 - (held and need_dx)
        sweeps = 1.0 if held or not need_dx else 2.0
        assert (b["x"].reads, b["dy"].reads) == (sweeps, sweeps)
