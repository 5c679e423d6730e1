"""Stand-ins for layers of libraries that need not be installed: what bnfast.convert knows of them, which is
their place, their name, what they hold and what they compute. `tests/convert/test_models.py` has the real
ones, where these are installed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Constants(nn.Module):
    """The four buffers of a frozen BatchNorm."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)


class TorchvisionFrozen(_Constants):
    """Arithmetic on tensors, so that the widest dtype is the output's."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight / (self.running_var + self.eps).sqrt()).view(1, -1, 1, 1)
        return (x - self.running_mean.view(1, -1, 1, 1)) * scale + self.bias.view(1, -1, 1, 1)


class DetectronFrozen(_Constants):
    """The output has the input's dtype."""

    _version = 3

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.num_features = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Puts a layer of its own, made of a BatchNorm2d's attributes, in the place of each of them."""
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            frozen = cls(module.num_features, module.eps)
            if module.affine:
                frozen.weight.data, frozen.bias.data = module.weight.data.clone(), module.bias.data.clone()
            frozen.running_mean.data = module.running_mean.data
            frozen.running_var.data = module.running_var.data
            return frozen
        for name, child in module.named_children():
            module.add_module(name, cls.convert_frozen_batchnorm(child))
        return module


class _Applying(nn.Module):
    """The modules that timm's layers call behind the normalization."""

    def _apply_to(self, act: nn.Module) -> None:
        self.drop, self.act = nn.Identity(), act


class BatchNormAct2d(_Applying, nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self._apply_to(act)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, momentum, self.eps)
        return self.act(self.drop(y))


class FrozenBatchNormAct2d(_Applying, TorchvisionFrozen):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self._apply_to(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class GroupNormAct(_Applying, nn.GroupNorm):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(2, channels)
        self._apply_to(act)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(y))


class LayerNormAct(_Applying, nn.LayerNorm):
    def __init__(self, shape: int, act: nn.Module) -> None:
        super().__init__(shape)
        self._apply_to(act)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class GroupNorm1(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)
        self._fast_norm = False


class LayerNorm2d(nn.LayerNorm):
    """Of the channels, which bnfast has not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GELUTanh(nn.Module):
    """One of timm's own activations."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


_PLACES: dict[type[nn.Module], tuple[str, str]] = {
    TorchvisionFrozen: ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    DetectronFrozen: ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"),
    BatchNormAct2d: ("timm.layers.norm_act", "BatchNormAct2d"),
    FrozenBatchNormAct2d: ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
    GroupNormAct: ("timm.layers.norm_act", "GroupNormAct"),
    LayerNormAct: ("timm.layers.norm_act", "LayerNormAct"),
    GroupNorm1: ("timm.layers.norm", "GroupNorm1"),
    LayerNorm2d: ("timm.layers.norm", "LayerNorm2d"),
    GELUTanh: ("timm.layers.activations", "GELUTanh"),
}


for _kind, (_place, _name) in _PLACES.items():
    _kind.__module__, _kind.__qualname__ = _place, _name


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets them be found where the libraries have theirs, whether these are installed or not."""
    for kind, (place, name) in _PLACES.items():
        for module in (place.split(".")[0], place):  # pickle asks for the first one too
            if module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, ModuleType(module))
        monkeypatch.setattr(sys.modules[place], name, kind, raising=False)
