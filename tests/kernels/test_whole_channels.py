"""BatchNorm and Batch Renormalization in one launch each way: where it is planned, what it moves and counts.
test_numerics.py and test_batchrenorm.py have its values."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

import bnfast
from bnfast.checks import one_step
from bnfast.checks.cases import Case, batch_renorm, given
from bnfast.kernels import batch_plan
from bnfast.kernels.batch_plan import Pass, WholePlan
from bnfast.kernels.epilogue import EpiloguePlan
from bnfast.kernels.layouts import is_channels_last
from bnfast.kernels.records import Problem
from bnfast.ptx import Execution
from tests.support.families import BF16, FP16, FP32, FP64, layouts
from tests.support.traffic import moved

CPU = torch.device("cpu")
SMS = 132


def planned(
    n: int, c: int, s: int, channels_last: bool = False, *, sms: int = SMS, itemsize: int = 2,
    epilogue: EpiloguePlan | None = None,
) -> tuple[WholePlan | None, WholePlan | None]:  # fmt: skip
    x, after = Problem(n, c, s, itemsize, channels_last, True, sms), epilogue or EpiloguePlan()
    return batch_plan.plan_whole(x, Pass.forward(after)), batch_plan.plan_whole(x, Pass.backward(after))


@pytest.mark.parametrize(
    ("n", "c", "s"), [(32, 512, 49), (32, 1024, 196), (32, 512, 784), (4, 64, 3136), (4, 512, 49)]
)
def test_where_there_are_many_channels_or_little_data(n: int, c: int, s: int) -> None:
    for plan in planned(n, c, s):
        assert plan is not None
        assert plan.programs >= min(c, SMS) / 4
        assert plan.splits == 1
        assert plan.handed == 0


@pytest.mark.parametrize(
    ("n", "c", "s", "last"),
    [
        (256, 64, 3136, False), (32, 64, 3136, False), (1, 3, 10**6, False), (128, 3, 1024, False),
        (256, 256, 3136, False), (256, 512, 784, False), (32, 256, 196, True), (32, 64, 3136, True),
    ],
)  # fmt: skip
def test_not_where_programs_would_be_few_or_read_memory_twice(n: int, c: int, s: int, last: bool) -> None:
    assert planned(n, c, s, last) == (None, None)


def test_programs_that_keep_their_channels() -> None:
    """Those of ResNet-50's last stages at a batch of 32 read x once."""
    for c, s in ((512, 49), (2048, 49), (1024, 196)):
        forward, _ = planned(32, c, s)
        assert forward is not None
        assert forward.tile.held


@pytest.mark.parametrize(("c", "s"), [(512, 49), (2048, 49), (1024, 196), (512, 784)])
def test_small_planes_with_a_residual(c: int, s: int) -> None:
    """Relu's mask does not bind channels together, so a program of a small batch has one and keeps it."""
    for plan in planned(4, c, s, epilogue=EpiloguePlan.of("relu", True, c, s, False)):
        assert plan is not None
        assert plan.programs == c
        assert plan.tile.held


def test_what_waits_as_long_issues_less() -> None:
    """Of four images of 14x14, a warp has all that a program loads in flight, or two if dy is loaded too."""
    forward, backward = planned(4, 512, 196)
    assert forward is not None
    assert backward is not None
    assert (forward.warps, backward.warps) == (1, 2)


SHAPES = [
    (8, 24, 7, 7), (8, 64, 14, 14), (5, 13, 3, 4), (4, 3, 15, 15), (2, 3, 70, 66), (1, 4, 9, 9),
    (9, 40, 1, 1), (40, 6, 28, 28), (3, 2, 41, 50), (2, 4, 3, 5, 7), (2, 3, 70, 130),
    (40, 24, 7, 7), (16, 24, 7, 7),
]  # fmt: skip
MOVES = [
    *layouts(*(Case(shape, FP16) for shape in SHAPES), batch_renorm((4, 24, 7, 7), FP16)),
    *(Case((40, 6, 28, 28), dtype) for dtype in (BF16, FP32, FP64)),
]


@pytest.mark.compiled
@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("case", MOVES, ids=str)
def test_moves(case: Case, executed: list[Execution]) -> None:
    """x and dy are read once by programs that keep them, else twice; nothing is handed to other programs."""
    g = given(case, CPU)
    n, c, *space = case.shape
    plans = planned(
        n, c, prod(space), is_channels_last(g.x), sms=3, itemsize=g.x.element_size()
    )  # fmt: skip
    module = one_step.layer(case, bnfast, g)
    batches = int(module.num_batches_tracked)
    leaves = [g.x.detach().requires_grad_(), module.weight, module.bias]
    with moved(executed) as t:
        y = module(leaves[0])
    with moved(executed) as b:
        dx, *_ = torch.autograd.grad(y, leaves, g.dy)
    assert int(module.num_batches_tracked) == batches + 1
    for plan, found, read, written in ((plans[0], t, [g.x], y), (plans[1], b, [g.x, g.dy], dx)):
        assert found.launches == (2 if plan is None else 1)
        often = 1.0 if plan is not None and plan.tile.held else 2.0
        assert [found.of(each).reads for each in read] == [often] * len(read)
        flow = found.of(written)
        assert (flow.writes, flow.reads, flow.unique_written) == (1.0, 0.0, flow.size)
        assert bool(found.named("partials_ptr")) == (plan is None)


def test_cases_take_every_way() -> None:
    plans: list[WholePlan | None] = []
    for case in MOVES:
        n, c, *space = case.shape
        last = case.channels_last or prod(space) == 1
        plans += planned(n, c, prod(space), last, sms=3, itemsize=case.dtype.itemsize)
    whole = [plan for plan in plans if plan is not None]
    assert {plan.tile.held for plan in whole} == {True, False}
    assert {plan.tile.mode for plan in whole} == {"nchw", "nchw_packed", "nhwc"}
    assert {plan.tile.channels for plan in whole if plan.tile.mode == "nchw_packed"} >= {1, 2, 4}
    assert None in plans


@pytest.mark.compiled
@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("layer", ["BatchNorm", "BatchRenorm"])
def test_the_counter_is_read_before_it_is_incremented(layer: str, executed: list[Execution]) -> None:
    """By programs that average over all batches, too. The executor would find one that reads it late."""
    case = replace(Case((6, 20, 5, 5)), layer=layer)
    g = given(case, CPU)
    module = one_step.layer(case, bnfast, g)
    module.momentum = None
    module.reset_running_stats()
    for batches in range(1, 4):
        with moved(executed) as t:
            module(g.x)
        assert t.launches == 1
        assert int(module.num_batches_tracked) == batches
    mean = g.x.double().mean((0, 2, 3))
    torch.testing.assert_close(module.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
