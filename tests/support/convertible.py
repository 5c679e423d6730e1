"""One of each layer that bnfast.convert knows, and a small network around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bnfast
from tests.support import foreign

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# name: (spatial dimensions of its input, the layer)
ALL: dict[str, tuple[int, Callable[[], nn.Module]]] = {
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
    # of other libraries
    "torchvision's FrozenBatchNorm2d": (2, lambda: foreign.TorchvisionFrozen(4)),
    "detectron2's FrozenBatchNorm2d": (2, lambda: foreign.DetectronFrozen(4, eps=1e-3)),
    "BatchNormAct2d": (2, lambda: foreign.BatchNormAct2d(4, nn.ReLU(inplace=True))),
    "BatchNormAct2d, Identity": (2, lambda: foreign.BatchNormAct2d(4, nn.Identity())),
    "BatchNormAct2d, LeakyReLU": (2, lambda: foreign.BatchNormAct2d(4, nn.LeakyReLU(0.2))),
    "FrozenBatchNormAct2d": (2, lambda: foreign.FrozenBatchNormAct2d(4, nn.Hardswish())),
    "GroupNormAct": (2, lambda: foreign.GroupNormAct(2, 4, nn.SiLU())),
    "LayerNormAct": (1, lambda: foreign.LayerNormAct(5, foreign.GELUTanh())),
    "timm's GroupNorm1": (2, lambda: foreign.GroupNorm1(1, 4)),
}


def around(norm: nn.Module, *behind: nn.Module, dims: int = 2, bias: bool = False) -> Any:
    """A layer behind a convolution, so that there is always something to train. Its parameters and statistics
    are not those of a new layer. All is in fp64."""
    torch.manual_seed(0)
    model = nn.Sequential(CONVOLUTIONS[dims](3, 4, 1, bias=bias), norm, *behind).double()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
    return model


def network(name: str) -> Any:
    torch.manual_seed(0)
    dims, make = ALL[name]
    return around(make(), dims=dims)


def data(like: str | int = 2) -> Tensor:
    """Input of a network: by its name, or with this number of spatial dimensions."""
    shape = (3, 3, *(5, 6, 2)[: like if isinstance(like, int) else ALL[like][0]])
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def attributes(module: nn.Module) -> dict[str, Any]:
    """Everything that a module holds, with dictionaries copied. They compare by the identity of objects."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}


class Leaves(torch.fx.Tracer):
    """It records the calls of bnfast's BatchNorm2d, and of its subclasses, and does not look into them."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, bnfast.BatchNorm2d) or super().is_leaf_module(m, name)
