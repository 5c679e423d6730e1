"""The layers whose counts are committed in budgets.csv: those where the time of real networks goes, and each
way through memory that the kernels have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from codegen.cases import Case

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Entry:
    """case.norm: "BatchRenorm" and "LayerNorm" too, which benchmarks do not measure. Without `training`, in
    eval."""

    case: Case
    training: bool = True

    def __str__(self) -> str:
        groups = f" {self.case.groups} groups" if self.case.norm == "GroupNorm" else ""
        return f"{self.case}{groups}{'' if self.training else ' eval'}"


def _entry(
    norm: str, shape: tuple[int, ...], last: bool = False, after: str = "", groups: int = 0,
    dtype: torch.dtype = BF16, training: bool = True,
) -> Entry:  # fmt: skip
    """after: "", "relu" or "z + relu"."""
    activation = "relu" if after else None
    case = Case(norm, shape, groups, dtype, last, activation, after.startswith("z"))
    return Entry(case, training)


def _resnet50(channels: int, side: int, last: bool, after: str = "", batch: int = 256) -> Entry:
    return _entry("BatchNorm", (batch, channels, side, side), last, after)


BOTH = (True, False)  # channels_last and contiguous
ENTRIES = (
    # ResNet-50, batch 256: the stem, the wide ends of blocks with and without what follows, the last stage
    *(_resnet50(64, 112, last, "relu") for last in BOTH),
    *(_resnet50(256, 56, last) for last in BOTH),
    *(_resnet50(256, 56, last, "z + relu") for last in BOTH),
    *(_resnet50(128, 28, last, "relu") for last in BOTH),
    *(_resnet50(1024, 14, last) for last in BOTH),
    *(_resnet50(1024, 14, last, "z + relu") for last in BOTH),
    *(_resnet50(512, 7, last, "relu", 64) for last in BOTH),
    *(_entry("BatchNorm", (256, 256, 56, 56), last, dtype=FP32) for last in BOTH),
    *(_entry("BatchNorm", (256, 256, 56, 56), last, training=False) for last in BOTH),
    _entry("BatchNorm", (256, 256, 56, 56), True, "z + relu", training=False),
    _entry("BatchRenorm", (64, 256, 14, 14), True),
    # diffusion networks: groups that a program holds in both directions, forward only, in neither; volumes
    _entry("GroupNorm", (16, 1280, 16, 16), groups=32),
    _entry("GroupNorm", (16, 1280, 16, 16), after="relu", groups=32),
    _entry("GroupNorm", (16, 320, 64, 64), groups=32),
    _entry("GroupNorm", (16, 320, 64, 64), True, groups=32),
    _entry("GroupNorm", (16, 640, 64, 64), groups=32),
    _entry("InstanceNorm", (2, 32, 128, 128, 128), groups=32),
    _entry("InstanceNorm", (2, 320, 8, 8, 8), groups=320),
    # transformers
    _entry("LayerNorm", (16384, 768)),
    _entry("LayerNorm", (16384, 4096)),
    _entry("LayerNorm", (16384, 768), dtype=FP32),
    # rows too long for a program to hold, and an activation, which LayerNorm's backward applies beforehand
    _entry("LayerNorm", (64, 40000)),
    _entry("LayerNorm", (16384, 768), after="relu"),
)
