"""Stand-ins for the normalization layers of torchvision, detectron2 and timm, which bnfast.convert knows by
name: the same names, attributes and arithmetic, where these libraries are not installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Frozen(nn.Module):
    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class _Act:
    """What timm's layers do after torch.nn's."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[misc]


class _BatchNormAct2d(_Act, nn.BatchNorm2d):
    def __init__(self, num_features: int, act_layer: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), act_layer()


class _GroupNormAct(_Act, nn.GroupNorm):
    def __init__(self, num_channels: int, num_groups: int = 4, act_layer: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(num_groups, num_channels)
        self.drop, self.act = nn.Identity(), act_layer()


class _Fancy(nn.GroupNorm):
    """timm's GroupNorm has the channels first, and a switch for fast norms."""

    def __init__(self, num_channels: int, num_groups: int = 4) -> None:
        super().__init__(num_groups, num_channels)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


STAND_INS: dict[str, dict[str, type[nn.Module]]] = {
    "torchvision.ops.misc": {"FrozenBatchNorm2d": _Frozen},
    "detectron2.layers.batch_norm": {"FrozenBatchNorm2d": _Frozen},
    "timm.layers.norm_act": {"BatchNormAct2d": _BatchNormAct2d, "GroupNormAct": _GroupNormAct},
    "timm.layers.norm": {"GroupNorm": _Fancy},
}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """By "module.Name": classes that pass for these libraries'."""
    classes: dict[str, Any] = {}
    for place, kinds in STAND_INS.items():
        module = ModuleType(place)
        monkeypatch.setitem(sys.modules, place, module)
        for name, kind in kinds.items():
            made = type(name, (kind,), {"__module__": place, "__qualname__": name})
            setattr(module, name, made)
            classes[f"{place}.{name}"] = made
    return classes
