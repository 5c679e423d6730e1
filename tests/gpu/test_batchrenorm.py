"""Batch Renormalization on a GPU: algorithm 1 wherever its schedule is, the schedule in a CUDA graph, and
batches that overflowed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import bnfast
from bnfast.checks import one_step, truth
from bnfast.checks.cases import Case, batch_renorm
from tests.gpu import parity
from tests.gpu.test_streams import captured
from tests.support.buffers import bit_identical
from tests.support.families import (
    BF16,
    FP16,
    FP32,
    far_means,
    in_dtypes,
    lacking,
    layouts,
    parameters,
    strides,
)

pytestmark = pytest.mark.gpu

ORDINARY = batch_renorm((6, 24, 14, 14))

FORMS = in_dtypes(
    [
        dataclasses.replace(case, training=training, affine=affine)
        for case in layouts(
            batch_renorm((200, 24)), batch_renorm((9, 24, 50)), ORDINARY, batch_renorm((4, 24, 5, 6, 7))
        )
        for training, affine in ((True, True), (True, False), (False, True))
    ]
)

SCHEDULES = in_dtypes(
    [
        dataclasses.replace(case, schedule=schedule)
        for case, schedule in itertools.product(
            layouts(ORDINARY),
            (
                (3.0, 5.0, 5, 9, 9),  # not yet: r is 1, d is 0
                (3.0, 5.0, 3, 9, 9),  # the last batch of that kind
                (1.2, 0.1, 0, 0, 0),  # from the start, and nearly all channels at their limits
                (100.0, 100.0, 0, 0, 0),  # no channel at its limits
                (1.0, 5.0, 0, 3, 3),  # r alone, then d alone, are never corrected
                (3.0, 0.0, 0, 3, 3),
                (3.0, 5.0, 0, 7, 11),  # on the way, by shares that no binary number is
            ),
        )
    ],
    (BF16, FP32),
)

HOSTILE = [
    *(
        batch_renorm((16, channels, 7, 7), FP32, last)
        for channels in (1, 3, 65, 1001)
        for last in (False, True)
    ),
    *strides(ORDINARY),
    *far_means(batch_renorm((16, 65, 9, 9))),
    *lacking(ORDINARY),
    *(
        dataclasses.replace(case, momentum=momentum)
        for case in layouts(ORDINARY)
        for momentum in (None, 0.0, 1.0)
    ),
    *layouts(batch_renorm((1, 1, 1000, 1000), BF16), batch_renorm((2, 512, 1, 1), FP16)),
    batch_renorm((70_000, 64), FP16),
    *in_dtypes(layouts(batch_renorm((32, 256, 56, 56)), batch_renorm((32, 2048, 7, 7))), (FP16, BF16)),
]


@pytest.mark.parametrize("case", parameters({"forms": FORMS, "schedules": SCHEDULES, "hostile": HOSTILE}))
def test_against_fp64(case: Case) -> None:
    parity.check(case)


@pytest.mark.parametrize("case", in_dtypes(layouts(ORDINARY), (BF16, FP32)), ids=str)
def test_the_schedule_goes_on_within_a_graph(case: Case) -> None:
    """Each replay is a batch of its own: with running statistics that stay (momentum 0), what changes from
    one to the next is the limits, which the kernels read off the batch counter."""
    case = dataclasses.replace(case, momentum=0.0)
    given = parity.given(case)
    # a tenth of the batch's deviation: r, and nearly every d, is at its limit
    tensors = dataclasses.replace(given, running_var=given.running_var / 100)
    graph, found = captured(case, tensors)
    seen = []
    for batch in range(case.batches, 8):  # the last limit is reached with 6
        graph.replay()
        assert found["num_batches_tracked"].item() == batch + 1
        expected = truth.expectations(dataclasses.replace(case, batches=batch), tensors)
        for name, value in expected.items():
            assert parity.excess(case, found[name], value) <= 1, f"{name} of batch {batch}"
        seen.append(found["y"].clone())
    assert [bit_identical(*pair) for pair in itertools.pairwise(seen)] == [False, False, False, True]


@pytest.mark.parametrize("case", layouts(ORDINARY), ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_batch_that_overflowed_leaves_no_trace(case: Case, value: float) -> None:
    """As under loss scaling, which throws the step away. Other channels never notice."""
    clean, dirty = parity.given(case), parity.given(case)
    dirty.x[-1, 7, -1, -1] = value
    expected, found = one_step.run(case, bnfast, clean), one_step.run(case, bnfast, dirty)
    others = torch.arange(case.shape[1], device=parity.device()) != 7
    for name in ("y", "dx", "dweight", "running_mean", "running_var"):
        axis = 1 if expected[name].dim() > 1 else 0
        pair = [t.movedim(axis, 0) for t in (expected[name], found[name])]
        assert bit_identical(*(t[others] for t in pair)), f"{name} of other channels"
        kept = getattr(clean, name, None)
        if kept is None:
            assert not torch.isfinite(pair[1][7]).all(), name
        else:
            assert bit_identical(pair[1][7], kept[7]), name
