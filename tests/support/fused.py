"""What the tests of bnfast.fuse share: blocks, a network, a batch, a model fused and as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast

CHANNELS = 4
CONV = (CHANNELS, CHANNELS, 1)
Make = Callable[[], nn.Module]
FACTOR = 2.0  # some tests change it


def relu(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y)


class Block(nn.Module):
    """conv, norm, and then what `tail` does: tail(self, norm's output, block's input). The attributes may be
    modules and parameters, too."""

    def __init__(self, tail: Callable[..., Any] = relu, **attributes: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(*CONV, bias=False), nn.BatchNorm2d(CHANNELS)
        self.kind = tail
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.kind(self, self.norm(self.conv(x)), x)


def tail(function: Callable[..., Any], **attributes: Any) -> Make:
    return lambda: Block(function, **copy.deepcopy(attributes))


def times(factor: Callable[[Any], Any], **attributes: Any) -> Make:
    """A block that multiplies its result by factor(block)."""
    return tail(lambda b, y, x: F.relu(y) * factor(b), **attributes)


def add_in_place(left: Tensor, right: Tensor) -> Tensor:
    left += right
    return left


def written_shortcut(b: Any, y: Tensor, x: Tensor) -> Tensor:
    shortcut = x * 2
    return F.relu(add_in_place(b.other(shortcut), y)) * shortcut


def around(factor: float) -> tuple[Callable[[Any], Any], Callable[[float], None]]:
    """A function with a variable around it, two functions away, and one that sets the variable."""

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return (lambda: lambda b: (lambda: factor)())(), change


class Residual(nn.Module):
    """ResNet's basic block, with a switch that its forward reads."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), norm(CHANNELS)
        self.conv2, self.bn2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), norm(CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(*CONV, bias=False), norm(CHANNELS)) if shortcut else None
        self.doubled = False

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        if self.doubled:
            out = 2 * out
        out += identity
        return self.relu(out)


def conv_norm_act(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(*CONV, bias=False), nn.BatchNorm2d(CHANNELS), activation or nn.ReLU())


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """5 sites in 6 layers, 2 of them with a residual."""
    torch.manual_seed(0)
    return nn.Sequential(conv_norm_act(), Residual(norm), Residual(norm, shortcut=True)).double()


def data(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, CHANNELS, 4, 4, dtype=torch.float64, generator=generator)


def pair(make: Make) -> tuple[Any, Any]:
    """A model fused, and the same as it was."""
    torch.manual_seed(0)
    theirs = make().double()
    return bnfast.fuse(copy.deepcopy(theirs)), theirs


def fused_count(model: nn.Module) -> int:
    return len(bnfast.fusion_report(model).fused)


def reason(model: nn.Module) -> str:
    """Why the only layer of a model that is not fused is not."""
    (skipped,) = bnfast.fusion_report(model).skipped
    return skipped.reason
