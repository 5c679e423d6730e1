"""Stand-ins for layers of libraries that need not be installed. They have what bnfast.convert looks at: the
name and module of the class, the attributes, and the result. `tests/convert/test_models.py` has the real
layers, where their libraries are installed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


KINDS = (
    TorchvisionFrozen, DetectronFrozen, BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct, LayerNormAct,
    GroupNorm1, GELUTanh,
)  # fmt: skip
