"""One of each layer that bnfast.convert knows, and a small network around it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.foreign import (
    BatchNormAct2d,
    DetectronFrozen,
    FrozenBatchNormAct2d,
    GELUTanh,
    GroupNorm1,
    GroupNormAct,
    LayerNormAct,
    TorchvisionFrozen,
)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Make = Callable[[], nn.Module]

# name: (spatial dimensions of its input, the layer)
TORCHS: dict[str, tuple[int, Make]] = {
    "BatchNorm1d": (1, lambda: nn.BatchNorm1d(4)),
    "BatchNorm2d": (2, lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)),
    "BatchNorm2d, cumulative": (2, lambda: nn.BatchNorm2d(4, momentum=None)),
    "BatchNorm2d, bare": (2, lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False)),
    "BatchNorm3d": (3, lambda: nn.BatchNorm3d(4)),
    "GroupNorm": (2, lambda: nn.GroupNorm(2, 4)),
    "GroupNorm, not affine": (2, lambda: nn.GroupNorm(2, 4, affine=False)),
    "InstanceNorm1d": (1, lambda: nn.InstanceNorm1d(4)),
    "InstanceNorm2d, tracking": (2, lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "InstanceNorm3d": (3, lambda: nn.InstanceNorm3d(4, affine=True)),
    "LayerNorm": (2, lambda: nn.LayerNorm([5, 6])),
    "LayerNorm, not affine": (1, lambda: nn.LayerNorm(5, elementwise_affine=False)),
    "LayerNorm, no bias": (1, lambda: nn.LayerNorm(5, bias=False)),
}
OTHERS: dict[str, tuple[int, Make]] = {
    "torchvision's FrozenBatchNorm2d": (2, lambda: TorchvisionFrozen(4)),
    "detectron2's FrozenBatchNorm2d": (2, lambda: DetectronFrozen(4, eps=1e-3)),
    "BatchNormAct2d": (2, lambda: BatchNormAct2d(4, nn.ReLU(inplace=True))),
    "BatchNormAct2d, Identity": (2, lambda: BatchNormAct2d(4, nn.Identity())),
    "BatchNormAct2d, LeakyReLU": (2, lambda: BatchNormAct2d(4, nn.LeakyReLU(0.2))),
    "FrozenBatchNormAct2d": (2, lambda: FrozenBatchNormAct2d(4, nn.Hardswish())),
    "GroupNormAct": (2, lambda: GroupNormAct(4, nn.SiLU())),
    "LayerNormAct": (1, lambda: LayerNormAct(5, GELUTanh())),
    "timm's GroupNorm1": (2, lambda: GroupNorm1(4)),
}
ALL = TORCHS | OTHERS


def network(name: str) -> nn.Sequential:
    """A layer behind a convolution, so that there is always something to train; all in fp64."""
    torch.manual_seed(0)
    dims, make = ALL[name]
    model = nn.Sequential(CONVOLUTIONS[dims](3, 4, 1, bias=False), make()).double()
    with torch.no_grad():
        for tensor in (*model[1].parameters(), *model[1].buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return model


def data(name: str) -> Tensor:
    shape = (3, 3, *(5, 6, 2)[: ALL[name][0]])
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
