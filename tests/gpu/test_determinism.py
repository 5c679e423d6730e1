"""The same input gives the same bits, however the hardware orders its work: the programs of a channel hand
their parts to whichever of them finishes last, which merges them in an order of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast.checks import one_step
from bnfast.checks.cases import Case, batch_renorm, group_norm, instance_norm, layer_norm
from bnfast.kernels import (
    column_sums,
    elementwise,
    group_plan,
    launch,
    launch_plan,
    one_pass,
    plan,
    reduce,
    row_plan,
)
from tests.gpu import parity
from tests.support.buffers import bit_identical
from tests.support.families import layouts

pytestmark = pytest.mark.gpu

REPEATS = 20

# The channels of each are split over many programs.
CASES = [
    Case((32, 64, 56, 56), torch.bfloat16),
    Case((32, 64, 56, 56), torch.bfloat16, channels_last=True),
    Case((1, 1, 1 << 21), torch.float32),
    Case((100_000, 24), torch.float32),
    Case((4096, 65, 7, 7), torch.float16),
    Case((64, 3, 101, 103), torch.float32, channels_last=True),
    Case((64, 24, 50), torch.float64),
    Case((64, 64, 28, 28), torch.bfloat16, training=False),
    *layouts(
        batch_renorm((32, 64, 56, 56), torch.bfloat16),
        instance_norm((2, 32, 64, 64, 64), torch.float32),
        group_norm((2, 64, 256, 256), torch.bfloat16, groups=8),
        group_norm((16, 960, 17, 17), torch.float16, groups=32),
        group_norm((64, 30, 28, 28), torch.float32, groups=3),
    ),
    *(layer_norm((2051, width), torch.bfloat16) for width in (768, 4096, 20000)),
]
FEW = [*CASES[:5], *CASES[8:]]


@pytest.fixture
def noise() -> Iterator[None]:
    """Other work on the GPU while the test runs, of no fixed rhythm: it shuffles which programs run when."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        a = torch.randn(2048, 2048, device=parity.device())
        for _ in range(40):
            a = (a @ a).clamp(-1, 1)
    yield
    stream.synchronize()


def assert_same(results: dict[str, Tensor], first: dict[str, Tensor], when: str) -> None:
    for name, value in results.items():
        assert bit_identical(value, first[name]), f"{name} {when}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repetition_gives_the_same_bits(case: Case, noise: None) -> None:
    tensors = parity.given(case)
    first = one_step.run(case, bnfast, tensors)
    for repeat in range(REPEATS):
        assert_same(one_step.run(case, bnfast, tensors), first, f"differs at repetition {repeat}")


@pytest.mark.parametrize("case", FEW, ids=str)
def test_forgetting_everything_gives_the_same_bits(case: Case) -> None:
    """Nothing that is cached between calls, plans, counters or compiled kernels, has a say in the result."""
    tensors = parity.given(case)
    first = one_step.run(case, bnfast, tensors)
    launch_plan.forget_plans()
    launch._workspaces.clear()
    for planned in (
        plan.plan_reduction,
        plan.plan_elementwise,
        group_plan.plan_one_pass,
        row_plan.column_sums,
    ):
        planned.cache_clear()
    for kernel in (
        one_pass.group_norm_kernel,
        one_pass.group_norm_gradients_kernel,
        column_sums.column_sums_kernel,
        reduce.statistics_kernel,
        elementwise.transform_kernel,
        reduce.gradient_sums_kernel,
        elementwise.gradient_transform_kernel,
    ):
        kernel.device_caches.clear()
    for _ in range(2):  # the first compiles and binds, the second runs what was bound
        assert_same(one_step.run(case, bnfast, tensors), first, "differs after the caches were cleared")
