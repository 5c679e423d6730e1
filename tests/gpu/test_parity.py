"""Every layer, layout, dtype and mode against fp64, on tame and on hostile tensors, on the shapes of networks
and on shapes drawn at random. bnfast.exact has the rule."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import gcd, prod
from typing import Any

import pytest
import torch

from bnfast.checks.cases import Case, batch_renorm, group_norm, instance_norm, layer_norm
from tests.kernels.test_numerics import CASES, GROUPS, TOO_LARGE_TO_HOLD, of_groups
from tests.support import oracle
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
    varied,
)  # fmt: skip

pytestmark = pytest.mark.gpu

Make = Callable[..., Case]


def forms(make: Make) -> list[Case]:
    """Of every number of dimensions, in every dtype, without parameters, and in eval."""
    shapes = ((200, 24), (9, 24, 50), (6, 24, 14, 14), (4, 24, 5, 6, 7))
    cases = [make(shape) for shape in shapes[make is instance_norm :]]  # which takes no 2-D input
    return in_dtypes(varied(layouts(*cases), {}, {"affine": False}, {"training": False}))


def hostile(make: Make) -> list[Case]:
    """Memory as no kernel would like it, means far from zero, missing parameters, and values of which all are
    in one plane."""
    usual, odd, large = map(make, ((6, 24, 14, 14), (16, 65, 9, 9), (4, 6, 200, 200)))
    means = [case for one in (usual, odd, large) for case in far_means(one)]
    planes = layouts(make((1, 1, 1000, 1000), BF16), make((1, 3, 999, 777), FP32))
    return [*strides(usual), *means, *lacking(usual), *planes]


def grouped(shape: tuple[int, ...], *dtype: torch.dtype, **options: Any) -> Case:
    """A GroupNorm of eight groups, or of as many as the channels allow."""
    return group_norm(shape, *dtype, groups=gcd(8, shape[1]), **options)


# apex #1768: wrong at C = 65. Planes of 49 leave no address divisible by more than two bytes.
ODD_CHANNELS = in_dtypes(
    layouts(*(make((16, c, 7, 7)) for make in (Case, batch_renorm) for c in (1, 3, 63, 65, 127, 1000, 1001))),
    (FP32, BF16),
)
# groups whose channels are no power of two, of planes that are no whole vectors
ODD_GROUPS = in_dtypes(
    layouts(
        *(group_norm((5, 4 * c, s, s), groups=4) for c in (1, 3, 10, 65) for s in (7, 17, 35)),
        *(instance_norm((5, c, 17, 17)) for c in (1, 3, 65, 127, 1001)),
    ),
    (BF16, FP32),
)

BATCHES = [
    *varied(strides(Case((8, 24, 14, 14))), {"training": False}),
    *varied(strides(Case((8, 24, 7, 7))), {"dtype": FP16}),
    Case((8, 24, 50), FP32, training=False, storage="sliced"),
    # fewer values a channel than there are CTAs; Triton programs without work have crashed others
    Case((2, 512)),
    Case((3, 1000, 1, 1), BF16),
    Case((2, 2049, 1, 1), FP16, channels_last=True),
    Case((1, 1, 2), FP32),
    Case((1, 7, 3, 5), BF16, channels_last=True),
    *layouts(batch_renorm((2, 512, 1, 1), FP16)),
    # a single value a channel, which only eval takes
    Case((1, 65), BF16, training=False),
    Case((1, 3, 1, 1), FP32, training=False),
    Case((1, 127, 1, 1, 1), FP16, channels_last=True, training=False),
    # many samples of next to nothing (apex GroupNorm divided by zero), also where a tail is ragged (FlagGems)
    Case((1024, 24, 1, 1), BF16),
    Case((1024, 24, 2, 1), FP16, channels_last=True),
    Case((1024, 5, 1, 3), FP32),
    *in_dtypes([Case((4096, 2, 9))], (FP32, BF16)),
    Case((4096, 2, 8), FP32),
    *(make((70_000, 64), FP16) for make in (Case, batch_renorm, grouped)),
    Case((4096, 24), FP32, mean=-1e4),
    # two dimensions, strided
    *(make((64, 30), FP16, storage="sliced") for make in (Case, grouped)),
    *(make((64, 30), FP32, storage="transposed") for make in (Case, grouped)),
    # what a layer can lack, and factors at the ends
    Case((8, 24, 14, 14), FP32, tracked=False, training=False),
    Case((8, 24, 14, 14), FP16, parameters=FP16),
    Case((8, 24, 14, 14), BF16, training=False, parameters=BF16, affine=False),
    *varied(
        layouts(Case((8, 24, 14, 14)), batch_renorm((6, 24, 14, 14))),
        *({"momentum": momentum} for momentum in (None, 0.0, 1.0)),
    ),
    # FlagGems' InstanceNorm added eps to the running variance: only a large one shows it
    *varied([Case((8, 24, 14, 14), FP32, eps=0.1)], {}, {"training": False}),
]
SCHEDULES = in_dtypes(
    varied(
        layouts(batch_renorm((6, 24, 14, 14))),
        {"schedule": (3.0, 5.0, 5, 9, 9)},  # not yet: r is 1, d is 0
        {"schedule": (3.0, 5.0, 3, 9, 9)},  # the last batch of that kind
        {"schedule": (1.2, 0.1, 0, 0, 0)},  # from the start, and nearly all channels at their limits
        {"schedule": (100.0, 100.0, 0, 0, 0)},  # no channel at its limits
        {"schedule": (1.0, 5.0, 0, 3, 3)},  # r alone, then d alone, are never corrected
        {"schedule": (3.0, 0.0, 0, 3, 3)},
        {"schedule": (3.0, 5.0, 0, 7, 11)},  # on the way, by shares that no binary number is
    ),
    (BF16, FP32),
)
MANY_GROUPS = [
    *in_dtypes(layouts(*of_groups(GROUPS + TOO_LARGE_TO_HOLD)), (BF16,)),
    *strides(group_norm((3, 40, 9, 9), groups=4)),
    *strides(instance_norm((2, 5, 7, 9, 11))),
    *varied([instance_norm((8, 30, 50))], {"dtype": FP16, "storage": "sliced"}, {"storage": "transposed"}),
    *varied([grouped((6, 24, 14, 14), FP16, channels_last=True)], {"parameters": BF16}, {"parameters": FP64}),
    # very many groups of next to nothing, down to one value a group
    *layouts(grouped((1024, 24, 1, 1), BF16), group_norm((1024, 24, 2, 1), FP16, groups=24)),
    *layouts(instance_norm((1024, 24, 2, 1), BF16), instance_norm((1024, 5, 1, 3), FP32)),
    instance_norm((4096, 20, 9), FP32),
    group_norm((4096, 8, 3), FP32, groups=2),
    group_norm((1000, 12), FP32, groups=12),
    # few groups: all the parallelism is within them
    *layouts(group_norm((2, 5000, 3, 3), BF16, groups=1), group_norm((1, 2049, 31, 1), FP16, groups=3)),
]
TRACKED = [
    *in_dtypes(
        varied(
            layouts(instance_norm((6, 24, 9, 11), tracked=True)),
            {}, {"momentum": 1.0}, {"momentum": None}, {"training": False},
        )
    ),
    instance_norm((9, 24, 50), BF16, tracked=True),
    instance_norm((9, 24, 50), FP32, tracked=True, training=False, affine=False),
    *layouts(instance_norm((2, 3, 8, 9, 10), FP16, tracked=True, parameters=FP16)),
    *layouts(instance_norm((6, 24, 9, 11), FP32, tracked=False, training=False)),
]  # fmt: skip

# one of each form of the plan, and widths around what is held
WIDTHS = (1, 3, 7, 64, 100, 256, 384, 768, 1000, 1001, 1024, 2048, 3072, 4096, 5000, 8192)
WIDE = (12288, 12296, 16384, 20000, 28680, 32769, 100_001, 1_000_000)
ROWS = [
    *in_dtypes(layer_norm((rows, width)) for width in WIDTHS for rows in (1, 37, 4099)),
    *in_dtypes(layer_norm((rows, width)) for width in WIDE for rows in (1, 300 if width < 100_000 else 7)),
    *(case for width in (7, 768, 4096, 20000) for case in far_means(layer_norm((65, width)))),
    *(layer_norm((65, width), FP64, mean=1e8) for width in (7, 768, 4096, 20000)),
    *varied(in_dtypes([layer_norm((130, 768))]), *({"parameters": dtype} for dtype in DTYPES)),
    *varied(
        [layer_norm((130, 768), BF16), layer_norm((130, 20000), BF16)], {"bias": False}, {"affine": False}
    ),
]

RESNET50 = in_dtypes(
    layouts(
        *(
            Case((32, channels, size, size))
            for channels, size in (
                (64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28),
                (256, 14), (512, 14), (1024, 14), (512, 7), (2048, 7),
            )
        ),
        batch_renorm((32, 256, 56, 56)),
        batch_renorm((32, 2048, 7, 7)),
    ),
    (BF16, FP16),
)  # fmt: skip
NETWORKS = in_dtypes(
    layouts(
        # Stable Diffusion's UNet, its VAE, and a 3-D U-Net
        *(group_norm((16, c, s, s), groups=32) for c, s in ((320, 64), (960, 64), (1920, 16), (2560, 8))),
        group_norm((1, 128, 512, 512), groups=32),
        grouped((1, 32, 128, 128, 128)),
        # the first and the last level of nnU-Net, and one between
        *(instance_norm((2, c, s, s, s)) for c, s in ((32, 128), (128, 32), (320, 4))),
    ),
    (FP16, BF16, FP32),
)


def drawn_shape(rng: random.Random, dims: int) -> tuple[int, ...]:
    """Sizes are log-uniform, so that 1 and 2 are as likely as hundreds; now and then a power of two. All of
    them together are enough for many programs a channel, and small enough for hundreds of cases."""
    longest = {2: 0, 3: 4096, 4: 160, 5: 32}[dims]
    while True:
        sizes = [round(2 ** rng.uniform(0, n.bit_length() - 1)) for n in (512, 1024, *[longest] * (dims - 2))]
        shape = tuple(1 << (n.bit_length() - 1) if rng.random() < 0.25 else n for n in sizes)
        if shape[1] < prod(shape) <= 2_000_000:  # training takes two values a channel or more
            return shape


def drawn(seed: int, layer: str) -> Case:
    rng = random.Random(seed)
    dims, dtype = rng.choice((2, 3, 4, 4, 4, 5)), rng.choice(DTYPES)
    n, c, *space = drawn_shape(rng, dims)
    if layer == "InstanceNorm" and prod(space) == 1:
        space = [*space[1:], 2]  # it takes two values a channel of a sample or more
    tracked = layer == "BatchRenorm" or (layer != "GroupNorm" and rng.random() < 0.85)
    schedules = (Case((1, 1)).schedule, (3.0, 5.0, 9, 20, 20), (50.0, 50.0, 0, 0, 0))
    return Case(
        (n, c, *space),
        dtype,
        layer=layer,
        channels_last=dims > 3 and rng.random() < 0.5,
        training=rng.random() < 0.75,
        mean=rng.choice((0.0, 0.5, -3.0, 30.0)),
        affine=rng.random() < 0.85,
        bias=rng.random() < 0.85,
        tracked=tracked,
        # torch.nn takes parameters in 16 bits only where the input has the same type
        parameters=dtype if rng.random() < 0.25 else None,
        momentum=rng.choice((0.1, 0.1, 0.9, None)) if tracked else 0.1,
        eps=rng.choice((1e-5, 1e-3)),
        storage=rng.choice(("dense", "dense", "dense", "offset", "sliced")),
        gradient=rng.choice(("dense", "dense", "dense", "expanded", "transposed", "offset")),
        seed=seed,
        groups=rng.choice([d for d in range(1, c + 1) if c % d == 0]) if layer == "GroupNorm" else 0,
        schedule=rng.choice(schedules) if layer == "BatchRenorm" else schedules[0],
    )


OTHERS = ("GroupNorm", "GroupNorm", "InstanceNorm", "BatchRenorm")
MAKES: tuple[Make, ...] = (Case, batch_renorm, grouped, instance_norm)
GROUPS_OF_CASES = {
    "forms": [case for make in MAKES for case in forms(make)],
    "odd": [*ODD_CHANNELS, *ODD_GROUPS],
    "hostile": [case for make in MAKES for case in hostile(make)],
    "batches": BATCHES,
    "schedules": SCHEDULES,
    "interpreted": [case for cases in CASES.values() for case in cases],  # see test_numerics.py
    "groups": MANY_GROUPS,
    "tracked": TRACKED,
    "rows": ROWS,
    "networks": [*RESNET50, *NETWORKS],
    **{f"random {seed}": [drawn(seed, "BatchNorm")] for seed in range(100)},
    **{f"random {seed}": [drawn(seed, OTHERS[seed % 4])] for seed in range(1000, 1060)},
}


@pytest.mark.parametrize("case", parameters(GROUPS_OF_CASES))
def test_against_fp64(case: Case, device: torch.device) -> None:
    oracle.check(case, device)
