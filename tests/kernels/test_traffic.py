"""What the compiled kernels move, counted where they are executed: bytes, sectors, launches."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast.checks import one_step
from bnfast.checks.cases import Case, batch_renorm, given, group_norm, instance_norm, layer_norm
from bnfast.kernels import batch_plan, group_plan
from bnfast.kernels.layouts import is_channels_last
from bnfast.ptx import Execution
from bnfast.ptx.traffic import Traffic
from tests.support.buffers import bit_identical, shifted
from tests.support.families import FP16, FP32, layouts
from tests.support.traffic import Moved, moved

# test_whole_channels.py has BatchNorm in one launch
pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("several_programs", "two_launches")]
SMS = 3  # the fixture's
CPU = torch.device("cpu")

SHAPES = [(8, c, size, size) for c in (24, 64, 96) for size in (7, 14, 28)] + [
    (5, 13, 3, 4), (4, 3, 15, 15), (2, 3, 70, 66), (1, 1, 66, 80), (33, 65, 1, 1), (2, 2, 3, 5, 7),
]  # fmt: skip
BATCH = layouts(*(Case(shape, FP16) for shape in SHAPES), batch_renorm((4, 24, 7, 7), FP16))
# whose groups are read in one pass, in the forward and in the backward
HELD = {
    (8, 24, 7, 7): 3, (2, 64, 14, 14): 8, (2, 20, 28, 28): 2, (5, 13, 3, 4): 13, (40, 16, 2, 2): 4,
    (4, 3, 15, 15): 1, (33, 65, 1, 1): 5, (2, 2, 3, 5, 7): 1,
}  # fmt: skip
# groups of 10 channels among them, which are no whole sectors and must cost no more
CHANNELS_LAST = {
    (2, 320, 6, 6): 32, (3, 40, 8, 8): 4, (2, 130, 4, 4): 2, (2, 96, 5, 5): 96, (1, 64, 9, 9): 8,
    (2, 9, 5, 5): 3, (2, 16, 3, 4, 5): 4,
}  # fmt: skip
ROWS = [layer_norm(shape, FP16) for shape in ((70, 1), (50, 7), (300, 64), (9, 100), (7, 768))]

# A case; (launches, times that x is read) of its forward, and of its backward, which reads dy as often; and
# the least useful share of the sectors that either moves.
STEPS = [
    *((case, (2, 2.0), (2, 2.0), 0.97 * (case.channels in (24, 64, 96))) for case in BATCH),
    *((replace(case, training=False), (1, 1.0), (1, 1.0), 0.0) for case in BATCH),
    *(
        (group_norm(shape, FP16, groups=groups), (1, 1.0), (2, 1.0), 0.97 * (prod(shape[2:]) % 16 == 0))
        for shape, groups in HELD.items()
    ),
    (group_norm((1, 2, 110, 110), FP16, groups=1), (1, 1.0), (3, 2.0), 0.0),  # held in the forward alone
    (group_norm((1, 2, 180, 180), FP16, groups=1), (2, 2.0), (3, 2.0), 0.0),
    (group_norm((1, 4, 160, 160), FP32, groups=2), (2, 2.0), (3, 2.0), 0.0),
    (group_norm((1, 6, 75, 149), FP32, groups=2), (2, 2.0), (3, 2.0), 0.0),
    *(
        (group_norm(shape, FP16, True, groups=groups), (2, 2.0), (3, 2.0), 0.95 * (shape[1] % 8 == 0))
        for shape, groups in CHANNELS_LAST.items()
    ),
    # torch copies these to contiguous and back
    (instance_norm((2, 8, 6, 6), FP16, True), (2, 2.0), (3, 2.0), 0.0),
    (instance_norm((2, 4, 3, 4, 5), FP16, True), (2, 2.0), (3, 2.0), 0.0),
    *((case, (1, 1.0), (2, 1.0), 0.97 * (case.channels % 64 == 0)) for case in ROWS),
    (layer_norm((2, 5000), FP32), (1, 1.0), (2, 1.0), 0.0),
    (layer_norm((2, 8201), FP32), (1, 2.0), (3, 2.0), 0.0),
    (layer_norm((2, 9000), FP32), (1, 1.0), (3, 2.0), 0.0),
    (layer_norm((2, 12296), FP16), (1, 1.0), (3, 2.0), 0.0),
]  # fmt: skip


def assert_planned(case: Case, x: Tensor, forward: Moved, backward: Moved) -> None:
    """The plan counts the same launches and bytes: all of data and of what programs hand over; and of a
    GroupNorm's statistics and coefficients, which many programs read, each value once out and once in."""
    n, c, *space = case.shape
    sizes, memory = (n, c, prod(space)), (x.element_size(), is_channels_last(x))
    planned = batch_plan.batch_norm(*sizes, *memory, sms=SMS)
    if case.in_sample:
        planned = group_plan.group_norm(*sizes, case.in_sample, *memory, sms=SMS)
    assert (forward.launches, backward.launches) == (planned.forward_launches, planned.backward_launches)
    for t, planned_bytes in ((forward, planned.forward_bytes), (backward, planned.backward_bytes)):
        often = t.named("stats_ptr", "dx_coeffs_ptr") if case.in_sample else []
        found = t.named("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "partials_ptr", "sums_ptr")
        total = sum(each.loaded + each.stored for each in found)
        assert total + sum(each.unique_read + each.unique_written for each in often) == planned_bytes


def written_once(*results: Traffic) -> bool:
    return all((r.writes, r.reads, r.unique_written) == (1.0, 0.0, r.size) for r in results)


@pytest.mark.parametrize(("case", "forward", "backward", "useful"), STEPS, ids=str)
def test_step(
    case: Case,
    forward: tuple[int, float],
    backward: tuple[int, float],
    useful: float,
    executed: list[Execution],
) -> None:
    g = given(case, CPU)
    module = one_step.layer(case, bnfast, g)
    leaves = [g.x.detach().requires_grad_(), module.weight, module.bias]
    with moved(executed) as t:
        y = module(leaves[0])
    assert t.launches == forward[0]
    assert (t.of(g.x).reads, t.of(g.x).writes) == (forward[1], 0.0)
    assert written_once(t.of(y))
    (stats,) = t.named("stats_ptr")
    assert stats.unique_written == stats.size
    with moved(executed) as b:
        dx, dweight, dbias = torch.autograd.grad(y, leaves, g.dy)
    assert b.launches == backward[0]
    assert [(flow.reads, flow.writes) for flow in (b.of(g.x), b.of(g.dy))] == [(backward[1], 0.0)] * 2
    assert written_once(b.of(dx))
    assert all(b.of(v).unique_written == b.of(v).size for v in (dweight, dbias))
    assert y.stride() == dx.stride() == g.x.stride()
    if useful:
        reads = [flow.read_efficiency for flow in (t.of(g.x), b.of(g.x), b.of(g.dy))]
        assert min(*reads, t.of(y).write_efficiency, b.of(dx).write_efficiency) >= useful
    if case.training and case.layer != "LayerNorm":
        assert_planned(case, g.x, t, b)


# A case; whether dx, dweight and dbias are wanted; launches, and how often x and dy are read.
FEW = layouts(*(Case(shape, FP16) for shape in ((8, 24, 7, 7), (5, 13, 3, 4), (2, 3, 70, 66))))
HELD_GROUP = group_norm((2, 12, 6, 6), FP16, groups=3)
WANTED = [
    *((case, "x", 2, 2.0, 2.0) for case in FEW),
    *((case, "w", 1, 1.0, 1.0) for case in FEW),
    *((replace(case, training=False), "x", 1, 0.0, 1.0) for case in FEW),
    (HELD_GROUP, "x", 1, 1.0, 1.0),
    (HELD_GROUP, "wb", 2, 1.0, 1.0),
    *(
        (group_norm(shape, FP16, True, groups=groups), *found)
        for shape, groups in (((2, 40, 6, 6), 4), ((2, 8, 6, 6), 8), ((2, 4, 3, 4, 5), 4))
        for found in (("x", 2, 2.0, 2.0), ("wb", 2, 1.0, 1.0))
    ),
    *(
        (layer_norm(shape), wanted, 1 + twice * ("x" in wanted) + (wanted != "x"), *reads)
        for shape, twice in (((300, 64), False), ((7, 768), False), ((2, 8201), True))
        for wanted, reads in (
            ("x", (1.0 + twice,) * 2), ("w", (1.0, 1.0)), ("b", (0.0, 1.0)), ("xb", (1.0 + twice,) * 2)
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("case", "wanted", "launches", "x_reads", "dy_reads"), WANTED, ids=str)
def test_only_what_is_wanted(
    case: Case, wanted: str, launches: int, x_reads: float, dy_reads: float, executed: list[Execution]
) -> None:
    """test_results.py has the values."""
    g = given(case, CPU)
    module = one_step.layer(case, bnfast, g)
    leaves = {"x": g.x.detach(), "w": module.weight, "b": module.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    y = module(leaves["x"])
    with moved(executed) as b:
        gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], g.dy)
    assert b.launches == launches
    assert (b.of(g.x).reads, b.of(g.dy).reads) == (x_reads, dy_reads)
    assert written_once(*(b.of(dx) for dx in gradients[: "x" in wanted]))


@pytest.mark.parametrize(
    "case",
    [Case((8, 24, 7, 7), training=False), *(layer_norm(s) for s in ((300, 64), (7, 768), (2, 8201)))],
    ids=str,
)
def test_no_stats_where_no_backward_follows(case: Case, executed: list[Execution]) -> None:
    g = given(case, CPU)
    module = one_step.layer(case, bnfast, g)
    y = module(g.x)
    with moved(executed) as t, torch.no_grad():
        again = module(g.x)
    assert t.launches == 1
    assert not t.named("stats_ptr")
    assert bit_identical(again, y)


@pytest.mark.parametrize("cut", [1, 3, 8], ids="cut {}".format)
@pytest.mark.parametrize(
    ("case", "launches", "reads"),
    [*((case, 2, 2.0) for case in layouts(Case((4, 16, 5, 5), FP16))), (layer_norm((5, 96), FP16), 1, 1.0)],
    ids=str,
)
def test_unaligned_storage(
    case: Case, launches: int, reads: float, cut: int, executed: list[Execution]
) -> None:
    """Tensors that start anywhere in their storage: the same traffic, no vector reaching outside.
    test_numerics.py has the values."""
    g = given(case, CPU)
    g = replace(g, **{name: shifted(t, cut) for name, t in g.tensors().items()})
    module = one_step.layer(case, bnfast, g)
    with moved(executed) as t:
        y = module(g.x)
    assert t.launches == launches
    assert (t.of(g.x).reads, t.of(y).writes) == (reads, 1.0)
