"""The layers whose counts are committed in budgets.csv: those where the time of real networks goes, and each
way through memory that the kernels have."""

from __future__ import annotations

import torch

from codegen.cases import Case

BF16, FP32 = torch.bfloat16, torch.float32
BOTH = (True, False)  # channels_last and contiguous


def layer(
    norm: str, shape: tuple[int, ...], last: bool = False, after: str = "", groups: int = 0,
    dtype: torch.dtype = BF16, training: bool = True,
) -> Case:  # fmt: skip
    """after: "", an activation, "z", or "z + " and an activation."""
    residual, activation = after.startswith("z"), after.removeprefix("z").removeprefix(" + ")
    groups = shape[1] if norm == "InstanceNorm" else groups
    return Case(norm, shape, groups, dtype, last, activation or None, residual, training=training)


# ResNet-50: the stem, the wide ends of blocks with and without what follows, the last stage
RESNET50 = (
    ((256, 64, 112, 112), "relu"), ((256, 256, 56, 56), ""), ((256, 256, 56, 56), "z + relu"),
    ((256, 128, 28, 28), "relu"), ((256, 1024, 14, 14), ""), ((256, 1024, 14, 14), "z + relu"),
    ((64, 512, 7, 7), "relu"),
)  # fmt: skip
CASES = (
    *(layer("BatchNorm", shape, last, after) for shape, after in RESNET50 for last in BOTH),
    *(layer("BatchNorm", (256, 256, 56, 56), last, dtype=FP32) for last in BOTH),
    *(layer("BatchNorm", (256, 256, 56, 56), last, training=False) for last in BOTH),
    layer("BatchNorm", (256, 256, 56, 56), True, "z + relu", training=False),
    layer("BatchRenorm", (64, 256, 14, 14), True),
    # diffusion networks: groups that a program holds in both directions, forward only, in neither; volumes
    layer("GroupNorm", (16, 1280, 16, 16), groups=32),
    layer("GroupNorm", (16, 1280, 16, 16), after="relu", groups=32),
    layer("GroupNorm", (16, 320, 64, 64), groups=32),
    layer("GroupNorm", (16, 320, 64, 64), True, groups=32),
    layer("GroupNorm", (16, 640, 64, 64), groups=32),
    layer("InstanceNorm", (2, 32, 128, 128, 128)),
    layer("InstanceNorm", (2, 320, 8, 8, 8)),
    # transformers
    layer("LayerNorm", (16384, 768)),
    layer("LayerNorm", (16384, 4096)),
    layer("LayerNorm", (16384, 768), dtype=FP32),
    # rows too long for a program to hold, and an activation, which LayerNorm's backward applies beforehand
    layer("LayerNorm", (64, 40000)),
    layer("LayerNorm", (16384, 768), after="relu"),
)
