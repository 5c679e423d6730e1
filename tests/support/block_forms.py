"""Blocks in the forms in which networks write norm, add and activation: what fuses, and what does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHANNELS = 4


class Block(nn.Module):
    """conv, norm, and then what `tail` does: tail(self, norm's output, block's input)."""

    def __init__(self, tail: Callable[..., Tensor] | None = None, **children: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        for name, child in children.items():
            self.add_module(name, child)
        self.kind = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.kind(self, self.norm(self.conv(x)), x)


class Residual(nn.Module):
    """ResNet's basic block, with a switch that its forward reads."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, shortcut: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), norm(CHANNELS)
        self.conv2, self.bn2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), norm(CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        projection = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), norm(CHANNELS))
        self.downsample = projection if shortcut else None
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


class Nested(nn.Module):
    """r3d_18's block: the layer before the add is the last of a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv_norm_act()
        self.second = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x))
        out += x
        return self.relu(out)


class Optional(nn.Module):
    """A forward with an argument that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return torch.relu(y) if skip is None else torch.relu(y + skip) * 2


def conv_norm_act(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS), activation or nn.ReLU()
    )


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """5 sites in 6 layers, 2 of them with a residual."""
    torch.manual_seed(0)
    return nn.Sequential(conv_norm_act(), Residual(norm), Residual(norm, shortcut=True)).double()


def _in_place_add(left: Tensor, right: Tensor) -> Tensor:
    left += right
    return left


def _second_name(block: Any, y: Tensor, x: Tensor) -> Tensor:
    shortcut = x * 2
    first = shortcut
    shortcut += 1
    return F.relu(y) * first


def _swapped_in_place(block: Any, y: Tensor, x: Tensor) -> Tensor:
    shortcut = block.other(x)
    shortcut += y
    return F.relu(shortcut)


# name: (block, activation, with a residual)
FUSABLE: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "module": (lambda: Block(lambda b, y, x: b.act(y), act=nn.ReLU()), "relu", False),
    "module in place": (lambda: Block(lambda b, y, x: b.act(y), act=nn.ReLU(inplace=True)), "relu", False),
    "function": (lambda: Block(lambda b, y, x: F.relu(y)), "relu", False),
    "function in place": (lambda: Block(lambda b, y, x: F.relu(y, inplace=True)), "relu", False),
    "torch.relu": (lambda: Block(lambda b, y, x: torch.relu(y)), "relu", False),
    "method": (lambda: Block(lambda b, y, x: y.relu()), "relu", False),
    "method in place": (lambda: Block(lambda b, y, x: y.relu_()), "relu", False),
    "identity": (lambda: Block(lambda b, y, x: F.relu(b.id(y)), id=nn.Identity()), "relu", False),
    "add": (lambda: Block(lambda b, y, x: F.relu(y + x)), "relu", True),
    "add, swapped": (lambda: Block(lambda b, y, x: F.relu(x + y)), "relu", True),
    "add in place": (lambda: Block(lambda b, y, x: F.relu(_in_place_add(y, x))), "relu", True),
    "torch.add": (lambda: Block(lambda b, y, x: torch.add(x, y).relu()), "relu", True),
    "add method": (lambda: Block(lambda b, y, x: y.add(x).relu()), "relu", True),
    "add_ method": (lambda: Block(lambda b, y, x: y.add_(x).relu_()), "relu", True),
    "add in place to a new tensor": (
        lambda: Block(_swapped_in_place, other=nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)), "relu", True,
    ),
    "in place under another name": (lambda: Block(_second_name), "relu", False),
    "identities around an add": (
        lambda: Block(lambda b, y, x: F.relu(b.id2(b.id1(y) + x)), id1=nn.Identity(), id2=nn.Identity()),
        "relu", True,
    ),
    "relu6": (lambda: Block(lambda b, y, x: F.relu6(y)), "relu6", False),
    "ReLU6": (lambda: conv_norm_act(nn.ReLU6(inplace=True)), "relu6", False),
    "hardtanh": (lambda: Block(lambda b, y, x: F.hardtanh(y, 0, 6)), "relu6", False),
    "leaky_relu": (lambda: Block(lambda b, y, x: F.leaky_relu(y, 0.2)), "leaky_relu", False),
    "LeakyReLU": (lambda: conv_norm_act(nn.LeakyReLU(0.3)), "leaky_relu", False),
    "elu": (lambda: Block(lambda b, y, x: F.elu(y, alpha=0.5)), "elu", False),
    "ELU": (lambda: conv_norm_act(nn.ELU(0.7)), "elu", False),
    "silu": (lambda: Block(lambda b, y, x: F.silu(y, inplace=True)), "silu", False),
    "SiLU": (lambda: conv_norm_act(nn.SiLU()), "silu", False),
    "gelu": (lambda: Block(lambda b, y, x: F.gelu(y)), "gelu", False),
    "gelu, tanh": (lambda: Block(lambda b, y, x: F.gelu(y, approximate="tanh")), "gelu_tanh", False),
    "GELU": (lambda: conv_norm_act(nn.GELU(approximate="tanh")), "gelu_tanh", False),
    "hardswish": (lambda: Block(lambda b, y, x: F.hardswish(y)), "hardswish", False),
    "Hardswish": (lambda: conv_norm_act(nn.Hardswish()), "hardswish", False),
    "hardsigmoid": (lambda: conv_norm_act(nn.Hardsigmoid()), "hardsigmoid", False),
    "mish": (lambda: conv_norm_act(nn.Mish()), "mish", False),
    "sigmoid": (lambda: Block(lambda b, y, x: y.sigmoid()), "sigmoid", False),
    "tanh": (lambda: Block(lambda b, y, x: torch.tanh(y)), "tanh", False),
}  # fmt: skip


def _used_twice(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) + y


def _input_written(block: Any, y: Tensor, x: Tensor) -> Tensor:
    shortcut = x * 2
    shortcut.mul_(3)
    return F.relu(y + shortcut)


def _swapped_in_place_and_used(block: Any, y: Tensor, x: Tensor) -> Tensor:
    first = shortcut = block.conv(x)
    shortcut += y
    return F.relu(shortcut) * first


def _input_written_later(block: Any, y: Tensor, x: Tensor) -> Tensor:
    shortcut = x * 2
    out = F.silu(y + shortcut)
    return out * shortcut.mul_(3)


def _written_by_out(block: Any, y: Tensor, x: Tensor) -> Tensor:
    shortcut = x * 2
    torch.mul(x, 3, out=shortcut)
    return F.relu(y + shortcut)


def _random_branch(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) if random.random() < 2 else y


def _no_grad(block: Any, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.sigmoid()
    return F.relu(y) * gate


def _grad_mode(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) if torch.is_grad_enabled() else y


def _remembers(block: Any, y: Tensor, x: Tensor) -> Tensor:
    block.last = y
    return F.relu(y)


def _hooked() -> nn.Module:
    module = conv_norm_act()
    module[2].register_forward_hook(lambda module, args, y: y + 1)
    return module


# name: (block, words of the reason)
def _checkpointed(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return checkpoint(lambda t: F.relu(t + x), y, use_reentrant=False)


def _checkpointed_reentrant(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return checkpoint(lambda t: F.relu(t + x), y, use_reentrant=True)


NOT_FUSABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no activation": (lambda: Block(lambda b, y, x: y), "its output is the block's"),
    "another module": (lambda: Block(lambda b, y, x: b.pool(y), pool=nn.MaxPool2d(2)), "MaxPool2d"),
    "dropout": (lambda: Block(lambda b, y, x: F.relu(b.drop(y)), drop=nn.Dropout()), "Dropout"),
    "function between": (lambda: Block(lambda b, y, x: F.relu(F.dropout(y, 0.5, b.training))), "dropout"),
    "hook": (_hooked, "(2) has hooks"),
    "another use": (lambda: Block(_used_twice), "another use"),
    "itself added": (lambda: Block(lambda b, y, x: F.relu(y + y)), "no other tensor"),
    "number added": (lambda: Block(lambda b, y, x: F.relu(y + 1)), "no other tensor"),
    "scaled add": (lambda: Block(lambda b, y, x: F.relu(torch.add(y, x, alpha=2))), "scaled"),
    "added to its input": (lambda: Block(lambda b, y, x: F.relu(_in_place_add(x * 1, y))), "in place"),
    "written before the add": (lambda: Block(_input_written), "may write in place"),
    "other hardtanh": (lambda: Block(lambda b, y, x: F.hardtanh(y, -1, 1)), "hardtanh"),
    "other ReLU": (lambda: conv_norm_act(type("Other", (nn.ReLU,), {})()), "Other"),
    "written as out": (lambda: Block(_written_by_out), "may write in place"),
    "added to what is used again": (lambda: Block(_swapped_in_place_and_used), "in place to a tensor"),
    "written after the add": (lambda: Block(_input_written_later), "may write to what was added"),
    "random branch": (lambda: Block(_random_branch), "random numbers"),
    "part without grad": (lambda: Block(_no_grad), "grad mode"),
    "branch on grad mode": (lambda: Block(_grad_mode), "grad mode"),
    "branch on a value": (lambda: Block(lambda b, y, x: F.relu(y) if y.sum() > 0 else y), "left as it is"),
    "branch on a type": (lambda: Block(lambda b, y, x: F.relu(y) if isinstance(x, Tensor) else y), "type of"),
    "attribute set": (lambda: Block(_remembers), "sets last"),
    "checkpointed part": (lambda: Block(_checkpointed), "torch.utils.checkpoint asks for the type"),
    "checkpointed part, reentrant": (lambda: Block(_checkpointed_reentrant), "left as it is"),
    "tensor made": (lambda: Block(lambda b, y, x: F.relu(y) * torch.ones(1)), "a tensor of its own"),
}  # fmt: skip
