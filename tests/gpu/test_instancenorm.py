"""InstanceNorm on a GPU: GroupNorm's kernels with a channel a group, and running statistics around them."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from bnfast.checks.cases import Case, instance_norm
from tests.gpu import parity
from tests.gpu.test_large import GB, need_memory
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

ORDINARY = instance_norm((6, 24, 14, 14))

FORMS = in_dtypes(
    [
        replace(case, affine=affine)
        for case in layouts(instance_norm((9, 24, 50)), ORDINARY, instance_norm((4, 24, 5, 6, 7)))
        for affine in (True, False)
    ]
)

TRACKED = [
    *in_dtypes(
        layouts(
            *(
                instance_norm((6, 24, 9, 11), tracked=True, training=training, momentum=momentum)
                for training, momentum in ((True, 0.1), (True, 1.0), (True, None), (False, 0.1))
            )
        )
    ),
    instance_norm((9, 24, 50), BF16, tracked=True),
    instance_norm((9, 24, 50), FP32, tracked=True, training=False, affine=False),
    *layouts(instance_norm((2, 3, 8, 9, 10), FP16, tracked=True, parameters=FP16)),
    *layouts(instance_norm((6, 24, 9, 11), FP32, tracked=False, training=False)),
]

ODD = in_dtypes(
    layouts(*(instance_norm((5, channels, 17, 17)) for channels in (1, 3, 65, 127, 1001))), (BF16, FP32)
)

HOSTILE = [
    *strides(ORDINARY),
    *strides(instance_norm((2, 5, 7, 9, 11))),
    instance_norm((8, 30, 50), FP16, storage="sliced"),
    instance_norm((8, 30, 50), FP32, storage="transposed"),
    *far_means(ORDINARY),
    *far_means(instance_norm((2, 3, 200, 200))),
    *lacking(ORDINARY),
    # two values a cell; very many cells; a single one
    *layouts(instance_norm((1024, 24, 2, 1), BF16), instance_norm((1024, 5, 1, 3), FP32)),
    instance_norm((4096, 20, 9), FP32),
    *layouts(instance_norm((1, 1, 1000, 1000), BF16), instance_norm((1, 3, 999, 777), FP32)),
]

# the first and the last level of nnU-Net, and one between
NNUNET = in_dtypes(
    layouts(
        instance_norm((2, 32, 128, 128, 128)),
        instance_norm((2, 128, 32, 32, 32)),
        instance_norm((2, 320, 4, 4, 4)),
    ),
    (FP16, BF16, FP32),
)


@pytest.mark.parametrize(
    "case", parameters({"forms": FORMS, "tracked": TRACKED, "odd": ODD, "hostile": HOSTILE, "nnunet": NNUNET})
)
def test_against_fp64(case: Case) -> None:
    need_memory(24 * prod(case.shape) * 8 / GB)  # the truth, its terms and its scales, in fp64
    parity.check(case)
