"""Every layout, dtype and mode against fp64, on tame and on hostile tensors. bnfast.exact has the rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast.checks import one_step, truth
from bnfast.checks.cases import Case, batch_renorm, group_norm, instance_norm
from tests.gpu import parity
from tests.support import families
from tests.support.buffers import bit_identical, nan_filled_allocations
from tests.support.families import BF16, DTYPES, FP16, FP32, FP64

pytestmark = pytest.mark.gpu

LAYOUTS = (False, True)

FORMS = [
    Case(shape, dtype, channels_last, training)
    for shape, layouts in (
        ((200, 24), (False,)),
        ((9, 24, 50), (False,)),
        ((6, 24, 14, 14), LAYOUTS),
        ((4, 24, 5, 6, 7), LAYOUTS),
    )
    for dtype, channels_last, training in itertools.product(DTYPES, layouts, (True, False))
]

# apex #1768: wrong at C = 65. Planes of 49 leave no address divisible by more than two bytes.
ODD_CHANNELS = [
    Case((16, channels, 7, 7), dtype, channels_last)
    for channels in (1, 3, 63, 65, 127, 1000, 1001)
    for dtype, channels_last in itertools.product((FP32, BF16), LAYOUTS)
]

HOSTILE = [
    # fewer values a channel than there are CTAs; Triton programs without work have crashed others
    Case((2, 512)),
    Case((3, 1000, 1, 1), BF16),
    Case((2, 2049, 1, 1), FP16, channels_last=True),
    Case((1, 1, 2), FP32),
    Case((1, 7, 3, 5), BF16, channels_last=True),
    # a single value a channel, which only eval takes
    Case((1, 65), BF16, training=False),
    Case((1, 3, 1, 1), FP32, training=False),
    Case((1, 127, 1, 1, 1), FP16, channels_last=True, training=False),
    # many samples of next to nothing (apex GroupNorm divided by zero), also where a tail is ragged (FlagGems)
    Case((1024, 24, 1, 1), BF16),
    Case((1024, 24, 2, 1), FP16, channels_last=True),
    Case((1024, 5, 1, 3), FP32),
    Case((4096, 2, 9), FP32),
    Case((4096, 2, 9), BF16),
    Case((4096, 2, 8), FP32),
    # one channel, one sample: all the parallelism is in the plane
    Case((1, 1, 1000, 1000), BF16),
    Case((1, 3, 999, 777), FP32),
    Case((1, 3, 999, 777), FP16, channels_last=True),
    Case((70_000, 64), FP16),
    # storage that is not where a kernel would like it; one element off turns 16-byte loads into 2-byte ones
    *(Case((8, 24, 14, 14), dtype, layout, storage="offset") for dtype in (BF16, FP32) for layout in LAYOUTS),
    *(Case((8, 24, 14, 14), BF16, layout, training=False, storage="offset") for layout in LAYOUTS),
    *(Case((8, 24, 14, 14), BF16, layout, storage="sliced") for layout in LAYOUTS),
    Case((8, 24, 14, 14), FP32, storage="transposed"),
    Case((64, 30), FP16, storage="sliced"),
    Case((64, 30), FP32, storage="transposed"),
    Case((8, 24, 50), FP32, training=False, storage="sliced"),
    # gradients as autograd makes them: y.sum(), y.t(), cat
    *(
        Case((8, 24, 14, 14), dtype, layout, training, gradient=gradient)
        for dtype, layout, training, gradient in itertools.product(
            (BF16, FP32), LAYOUTS, (True, False), ("expanded", "transposed")
        )
    ),
    *(Case((8, 24, 7, 7), FP16, layout, gradient=how) for layout in LAYOUTS for how in ("sliced", "offset")),
    # means far from zero, as many deviations as the dtype can tell apart
    *(Case((16, 65, 9, 9), dtype, layout, mean=1e4) for dtype in (FP32, FP64) for layout in LAYOUTS),
    *(Case((16, 65, 9, 9), dtype, layout, mean=100.0) for dtype in (FP16, BF16) for layout in LAYOUTS),
    Case((4, 3, 200, 200), FP32, mean=1e4),
    Case((4096, 24), FP32, mean=-1e4),
    # what a layer can lack, and factors at the ends
    Case((8, 24, 14, 14), BF16, affine=False),
    Case((8, 24, 14, 14), FP32, channels_last=True, bias=False),
    Case((8, 24, 14, 14), FP32, tracked=False, training=False),
    Case((8, 24, 14, 14), FP16, parameters=FP16),
    Case((8, 24, 14, 14), BF16, channels_last=True, parameters=BF16),
    Case((8, 24, 14, 14), BF16, training=False, parameters=BF16, affine=False),
    *(Case((8, 24, 14, 14), FP32, momentum=momentum) for momentum in (None, 0.0, 1.0)),
    # FlagGems' InstanceNorm added eps to the running variance: only a large one shows it
    *(Case((8, 24, 14, 14), FP32, training=training, eps=0.1) for training in (True, False)),
]

RESNET50 = [
    Case((32, channels, size, size), dtype, channels_last)
    for channels, size in (
        (64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28),
        (256, 14), (512, 14), (1024, 14), (512, 7), (2048, 7),
    )
    for dtype, channels_last in itertools.product((BF16, FP16), LAYOUTS)
]  # fmt: skip


GROUPS = {"forms": FORMS, "odd channels": ODD_CHANNELS, "hostile": HOSTILE, "resnet50": RESNET50}


@pytest.mark.parametrize("case", families.parameters(GROUPS))
def test_against_fp64(case: Case) -> None:
    parity.check(case)


BATCH_TRAPS = ("none", "zero first", "spike", "running mean NaN")
FAR = [
    *itertools.product(families.layouts(Case((32, 96, 14, 14), mean=1e4)), BATCH_TRAPS),
    *itertools.product(
        families.layouts(
            group_norm((8, 96, 14, 14), mean=1e4, groups=8), instance_norm((8, 20, 15, 15), mean=1e4)
        ),
        BATCH_TRAPS[:3],
    ),
    *((group_norm((2, 6, 160, 150), mean=1e4, groups=2), trap) for trap in BATCH_TRAPS[:3]),
]


@pytest.mark.parametrize(("case", "trap"), FAR, ids=str)
def test_as_good_as_two_passes_at_a_large_mean(case: Case, trap: str) -> None:
    """At mean 1e4 and std 1, fp32, the error is within twice that of fp64 with its mean rounded to fp32: none
    is lost to cancellation, whatever a kernel might have taken for its pivot."""
    tensors = parity.given(case)
    if trap == "zero first":
        tensors.x[:, :, 0, 0] = 0.0
    elif trap == "spike":
        tensors.x[:, :, 0, 0] = 3e4
    elif trap == "running mean NaN":
        tensors.running_mean.fill_(float("nan"))
    exact = truth.of(case, tensors)
    normal, x, g = exact.normal, *(exact.seen(t.double()) for t in (tensors.x, tensors.dy))
    cell, channel = ((2, 3, 4), (0, 3, 4)) if case.in_sample else ((0, 2, 3), (0, 2, 3))
    xhat, h = (x - normal.mean.float().double()) * normal.rstd, g * normal.weight
    means = h.mean(cell, keepdim=True), (h * xhat).mean(cell, keepdim=True)
    dx = normal.rstd * (h - means[0] - xhat * means[1])
    two_passes = {"y": exact.as_x(xhat * normal.weight + normal.bias), "dx": exact.as_x(dx)}
    two_passes["dweight"] = (g * xhat).sum(channel).flatten()
    ours = one_step.run(case, bnfast, tensors)
    expected = truth.expectations(case, tensors)

    def error(value: Tensor, name: str) -> float:
        true, _ = expected[name]
        return ((value.double() - true).norm() / true.norm()).item()

    for name, other in two_passes.items():
        limit = 2 * error(other.float(), name) + 2 * torch.finfo(FP32).eps
        assert error(ours[name], name) <= limit, name


@pytest.mark.parametrize("shape", [(32, 65), (8, 65, 7, 7), (8, 64, 14, 14), (4, 6, 100, 100)], ids=str)
@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_one_bad_value_spoils_one_channel(shape: tuple[int, ...], channels_last: bool, value: float) -> None:
    """An inf or NaN shows in all that is computed from its channel, and leaves no trace in others."""
    case = Case(shape, FP32, channels_last)
    clean, dirty = parity.given(case), parity.given(case)
    channel = shape[1] // 2
    dirty.x[(shape[0] - 1, channel, *[-1] * (len(shape) - 2))] = value
    expected, found = one_step.run(case, bnfast, clean), one_step.run(case, bnfast, dirty)
    others = torch.arange(shape[1], device=parity.device()) != channel
    for name in ("y", "dx", "dweight", "running_mean", "running_var"):
        axis = 1 if expected[name].dim() > 1 else 0
        assert not torch.isfinite(found[name].select(axis, channel)).all(), name
        left = (t.movedim(axis, 0)[others] for t in (expected[name], found[name]))
        assert bit_identical(*left), f"{name} of other channels"


WANTED = list(itertools.product((True, False), repeat=3))[1:-1]  # neither all nor none


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((8, 24, 14, 14), BF16),
        Case((8, 24, 14, 14), BF16, training=False),
        batch_renorm((8, 24, 14, 14), BF16),
        *families.layouts(group_norm((8, 24, 14, 14), BF16, groups=4), instance_norm((8, 24, 14, 14), BF16)),
        group_norm((1, 4, 256, 256), BF16, groups=2),
    ],
    ids=str,
)
def test_gradients_that_are_not_wanted(case: Case, wanted: tuple[bool, bool, bool]) -> None:
    """Leaving gradients out takes other kernels, which compute the rest as well as ever."""
    tensors = parity.given(case)
    expected = truth.expectations(case, tensors)
    module = one_step.layer(case, bnfast, tensors)
    leaves = {"dx": tensors.x.detach(), "dweight": module.weight, "dbias": module.bias}
    for leaf, want in zip(leaves.values(), wanted, strict=True):
        leaf.requires_grad_(want)
    chosen = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    with nan_filled_allocations():
        gradients = torch.autograd.grad(module(leaves["dx"]), list(chosen.values()), tensors.dy)
    for name, gradient in zip(chosen, gradients, strict=True):
        assert parity.excess(case, gradient, expected[name]) <= 1, name
