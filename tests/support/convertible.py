"""The layers that bnfast.convert knows, and a small network around each.

Those of other libraries, which need not be installed, are stand-ins. They have what bnfast.convert looks at:
the name and module of the class, the attributes, and the result. `tests/convert/test_models.py` has the real
layers, where their libraries are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast


class _Constants(nn.Module):
    """The four buffers of a frozen BatchNorm."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = channels, eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)


class TorchvisionFrozen(_Constants):
    """Arithmetic on tensors, so that the widest dtype is the output's."""

    __module__, __qualname__ = "torchvision.ops.misc", "FrozenBatchNorm2d"

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight / (self.running_var + self.eps).sqrt()).view(1, -1, 1, 1)
        return (x - self.running_mean.view(1, -1, 1, 1)) * scale + self.bias.view(1, -1, 1, 1)


class DetectronFrozen(_Constants):
    """The output has the input's dtype."""

    __module__, __qualname__ = "detectron2.layers.batch_norm", "FrozenBatchNorm2d"
    _version = 3

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class _Applying(nn.Module):
    """timm's layers call two modules after the normalization. The last argument is the activation."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments[:-1])
        self.drop, self.act, self._fast_norm = nn.Identity(), arguments[-1], False

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class BatchNormAct2d(_Applying, nn.BatchNorm2d):
    __module__ = "timm.layers.norm_act"

    def forward(self, x: Tensor) -> Tensor:  # as timm's, for torch.jit.script compiles no super()
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, momentum, self.eps)
        return self.act(self.drop(y))


class FrozenBatchNormAct2d(_Applying, TorchvisionFrozen):
    __module__, __qualname__ = "timm.layers.norm_act", "FrozenBatchNormAct2d"


class GroupNormAct(_Applying, nn.GroupNorm):
    __module__ = "timm.layers.norm_act"


class LayerNormAct(_Applying, nn.LayerNorm):
    __module__ = "timm.layers.norm_act"


class GroupNorm1(nn.GroupNorm):
    __module__ = "timm.layers.norm"


class GELUTanh(nn.Module):
    """One of timm's own activations."""

    __module__ = "timm.layers.activations"

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


STAND_INS = (
    TorchvisionFrozen, DetectronFrozen, BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct, LayerNormAct,
    GroupNorm1, GELUTanh,
)  # fmt: skip

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
    "torchvision's FrozenBatchNorm2d": (2, lambda: TorchvisionFrozen(4)),
    "detectron2's FrozenBatchNorm2d": (2, lambda: DetectronFrozen(4, eps=1e-3)),
    "BatchNormAct2d": (2, lambda: BatchNormAct2d(4, nn.ReLU(inplace=True))),
    "BatchNormAct2d, Identity": (2, lambda: BatchNormAct2d(4, nn.Identity())),
    "BatchNormAct2d, LeakyReLU": (2, lambda: BatchNormAct2d(4, nn.LeakyReLU(0.2))),
    "FrozenBatchNormAct2d": (2, lambda: FrozenBatchNormAct2d(4, nn.Hardswish())),
    "GroupNormAct": (2, lambda: GroupNormAct(2, 4, nn.SiLU())),
    "LayerNormAct": (1, lambda: LayerNormAct(5, GELUTanh())),
    "timm's GroupNorm1": (2, lambda: GroupNorm1(1, 4)),
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
