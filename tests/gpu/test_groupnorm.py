"""GroupNorm on a GPU: every way through its kernels, and the shapes of the networks that use it."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

import bnfast
from bnfast.checks import one_step
from bnfast.checks.cases import Case, group_norm
from tests.gpu import parity
from tests.gpu.test_large import GB, need_memory
from tests.kernels.test_numerics import GROUPS, TOO_LARGE_TO_HOLD
from tests.support.buffers import bit_identical
from tests.support.families import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    far_means,
    in_dtypes,
    lacking,
    layouts,
    parameters,
    strides,
)

pytestmark = pytest.mark.gpu

ORDINARY = group_norm((6, 24, 14, 14), groups=8)

FORMS = in_dtypes(
    [
        replace(case, affine=affine)
        for case in layouts(
            group_norm((200, 24), groups=6),
            group_norm((9, 24, 50), groups=4),
            ORDINARY,
            group_norm((4, 24, 5, 6, 7), groups=3),
        )
        for affine in (True, False)
    ]
)

# those of the interpreter tests, which say which way each takes
INTERPRETED = [group_norm(shape, groups=n) for shape, n in (GROUPS | TOO_LARGE_TO_HOLD).values()]
WAYS = in_dtypes(layouts(*INTERPRETED), (BF16, FP32))

# groups whose channels are no power of two, of planes that are no whole vectors
ODD = in_dtypes(
    layouts(
        *(
            group_norm((5, 4 * group, size, size), groups=4)
            for group in (1, 3, 10, 65)
            for size in (7, 17, 35)
        )
    ),
    (BF16, FP32),
)

HOSTILE = [
    *strides(ORDINARY),
    *strides(group_norm((3, 40, 9, 9), groups=4)),
    group_norm((64, 30), FP16, groups=3, storage="sliced"),
    group_norm((64, 30), FP32, groups=3, storage="transposed"),
    *far_means(ORDINARY),
    *far_means(group_norm((2, 20, 120, 120), groups=2)),
    *lacking(ORDINARY),
    *(group_norm((6, 24, 14, 14), FP32, groups=8, parameters=dtype) for dtype in DTYPES),
    *(group_norm((6, 24, 14, 14), FP16, True, groups=8, parameters=dtype) for dtype in (BF16, FP64)),
    # many samples of next to nothing (apex GroupNorm divided by zero), down to one value a group
    *layouts(group_norm((1024, 24, 1, 1), BF16, groups=8), group_norm((1024, 24, 2, 1), FP16, groups=24)),
    group_norm((4096, 8, 3), FP32, groups=2),
    group_norm((70_000, 64), FP16, groups=8),
    group_norm((1000, 12), FP32, groups=12),
    # one sample, one group: all the parallelism is within it
    *layouts(group_norm((1, 1, 1000, 1000), BF16, groups=1), group_norm((1, 3, 999, 777), FP32, groups=1)),
    *layouts(group_norm((2, 5000, 3, 3), BF16, groups=1), group_norm((1, 2049, 31, 1), FP16, groups=3)),
]

NETWORKS = in_dtypes(
    layouts(
        # Stable Diffusion's UNet
        group_norm((16, 320, 64, 64), groups=32),
        group_norm((16, 960, 64, 64), groups=32),
        group_norm((16, 1920, 16, 16), groups=32),
        group_norm((16, 2560, 8, 8), groups=32),
        # and its VAE
        group_norm((1, 128, 512, 512), groups=32),
        # a 3-D U-Net
        group_norm((1, 32, 128, 128, 128), groups=8),
    ),
    (FP16, BF16, FP32),
)


@pytest.mark.parametrize(
    "case", parameters({"forms": FORMS, "ways": WAYS, "odd": ODD, "hostile": HOSTILE, "networks": NETWORKS})
)
def test_against_fp64(case: Case) -> None:
    need_memory(24 * prod(case.shape) * 8 / GB)  # the truth, its terms and its scales, in fp64
    parity.check(case)


@pytest.mark.parametrize(
    "case",
    layouts(
        group_norm((4, 24, 14, 14), groups=6),
        group_norm((4, 130, 7, 7), BF16, groups=2),
        group_norm((2, 8, 200, 200), groups=2),
        group_norm((300, 24, 2, 2), FP64, groups=6),
    ),
    ids=str,
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_one_bad_value_spoils_one_group(case: Case, value: float) -> None:
    """An inf or NaN shows in all of its sample's group, and leaves no trace in others."""
    clean, dirty = parity.given(case), parity.given(case)
    samples, channels = case.shape[:2]
    sample, channel = samples - 1, channels // 2
    dirty.x[sample, channel, -1, -1] = value
    expected, found = one_step.run(case, bnfast, clean), one_step.run(case, bnfast, dirty)
    size = channels // case.groups
    spoilt = torch.zeros(samples, channels, dtype=torch.bool, device=parity.device())
    spoilt[sample, channel // size * size :][:size] = True
    for name in ("y", "dx"):
        assert found[name][spoilt].isnan().all(), name
        assert bit_identical(found[name][~spoilt], expected[name][~spoilt]), f"{name} of other groups"
