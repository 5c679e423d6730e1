"""The layers whose counts are committed in budgets.csv: those where the time of real networks goes, and each
way through memory that the kernels have."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from codegen.cases import Case

BF16, FP32 = torch.bfloat16, torch.float32
LAST, BOTH = (True,), (True, False)  # channels_last, and contiguous too


def layers(
    norm: str, *shapes: tuple[int, ...], after: Iterable[str] = ("",),
    dtypes: Iterable[torch.dtype] = (BF16,), last: Iterable[bool] = (False,), groups: int = 0,
    training: bool = True,
) -> list[Case]:  # fmt: skip
    """All combinations. after: "", an activation, "z", or "z + " and an activation."""
    found = []
    for shape, what, dtype, channels_last in itertools.product(shapes, after, dtypes, last):
        residual, activation = what.startswith("z"), what.removeprefix("z").removeprefix(" + ") or None
        of_sample = shape[1] if norm == "InstanceNorm" else groups
        case = Case(norm, shape, of_sample, dtype, channels_last, activation, residual, training=training)
        found.append(case)
    return found


CASES = (
    # ResNet-50: the stem, the wide ends of blocks with and without what follows, the last stage
    *layers("BatchNorm", (256, 64, 112, 112), after=["relu"], last=BOTH),
    *layers("BatchNorm", (256, 256, 56, 56), after=["", "z + relu"], last=BOTH),
    *layers("BatchNorm", (256, 128, 28, 28), after=["relu"], last=BOTH),
    *layers("BatchNorm", (256, 1024, 14, 14), after=["", "z + relu"], last=BOTH),
    *layers("BatchNorm", (64, 512, 7, 7), after=["relu"], last=BOTH),
    *layers("BatchNorm", (256, 256, 56, 56), dtypes=[FP32], last=BOTH),
    *layers("BatchNorm", (256, 256, 56, 56), last=BOTH, training=False),
    *layers("BatchNorm", (256, 256, 56, 56), after=["z + relu"], last=LAST, training=False),
    *layers("BatchRenorm", (64, 256, 14, 14), last=LAST),
    # diffusion networks: groups that a program holds in both directions, forward only, in neither; volumes
    *layers("GroupNorm", (16, 1280, 16, 16), after=["", "relu"], groups=32),
    *layers("GroupNorm", (16, 320, 64, 64), last=(False, True), groups=32),
    *layers("GroupNorm", (16, 640, 64, 64), groups=32),
    *layers("InstanceNorm", (2, 32, 128, 128, 128), (2, 320, 8, 8, 8)),
    # transformers
    *layers("LayerNorm", (16384, 768), (16384, 4096)),
    *layers("LayerNorm", (16384, 768), dtypes=[FP32]),
    # rows too long for a program to hold, and an activation, which LayerNorm's backward applies beforehand
    *layers("LayerNorm", (64, 40000)),
    *layers("LayerNorm", (16384, 768), after=["relu"]),
)
