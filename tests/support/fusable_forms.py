"""Blocks in the forms in which networks write norm, add and activation: all of them are fused."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.fused import CHANNELS, CONV, Make, conv_norm_act, data, tail, times

RELU, ADD_RELU = ("relu", False), ("relu", True)
FLAG = True


def add_in_place(left: Tensor, right: Tensor) -> Tensor:
    left += right
    return left


def second_name(b: Any, y: Tensor, x: Tensor) -> Tensor:
    shortcut = x * 2
    first = shortcut
    shortcut += 1
    return F.relu(y) * first


def residual_of_a_residual(b: Any, y: Tensor, x: Tensor) -> Tensor:
    first = F.relu(y + x)
    second = F.relu(b.bn2(first) + first)
    return F.relu(b.bn3(second) + first) + second


def step(norm: nn.Module, x: Tensor) -> Tensor:
    return F.relu(norm(x) + x)


class Nested(nn.Module):
    """r3d_18's block: the layer before the add is the last of a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_norm_act(), conv_norm_act()[:2]
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(add_in_place(self.second(self.first(x)), x))


# name: (a function or module, what it is to the kernels)
ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "ReLU": (nn.ReLU(), "relu"),
    "ReLU in place": (nn.ReLU(inplace=True), "relu"),
    "relu in place": (lambda y: F.relu(y, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    "method": (lambda y: y.relu(), "relu"),
    "method in place": (lambda y: y.relu_(), "relu"),
    "relu6": (F.relu6, "relu6"),
    "ReLU6": (nn.ReLU6(inplace=True), "relu6"),
    "hardtanh": (lambda y: F.hardtanh(y, 0, 6), "relu6"),
    "leaky_relu": (lambda y: F.leaky_relu(y, 0.2), ("leaky_relu", 0.2)),
    "LeakyReLU": (nn.LeakyReLU(0.3), ("leaky_relu", 0.3)),
    "elu": (lambda y: F.elu(y, alpha=0.5), ("elu", 0.5)),
    "ELU": (nn.ELU(0.7), ("elu", 0.7)),
    "silu": (lambda y: F.silu(y, inplace=True), "silu"),
    "SiLU": (nn.SiLU(), "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu, tanh": (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    "GELU": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "hardswish": (F.hardswish, "hardswish"),
    "Hardswish": (nn.Hardswish(), "hardswish"),
    "Hardsigmoid": (nn.Hardsigmoid(), "hardsigmoid"),
    "Mish": (nn.Mish(), "mish"),
    "sigmoid": (lambda y: y.sigmoid(), "sigmoid"),
    "tanh": (torch.tanh, "tanh"),
}
SECOND = {"conv2": nn.Conv2d(*CONV, bias=False), "bn2": nn.BatchNorm2d(CHANNELS)}
SECOND |= {"relu": nn.ReLU(), "id": nn.Identity()}
THIRD = {**SECOND, "bn3": nn.BatchNorm2d(CHANNELS)}

# name: (block, the sites in the order of their calls: (activation, with a residual))
FUSABLE: dict[str, tuple[Make, list[tuple[Any, bool]]]] = {
    "function": (tail(lambda b, y, x: F.relu(y)), [RELU]),
    "Sequential": (conv_norm_act, [RELU]),
    "identity": (tail(lambda b, y, x: F.relu(b.id(y)), id=nn.Identity()), [RELU]),
    "add": (tail(lambda b, y, x: F.relu(y + x)), [ADD_RELU]),
    "add, swapped": (tail(lambda b, y, x: F.relu(x + y)), [ADD_RELU]),
    "add in place": (tail(lambda b, y, x: F.relu(add_in_place(y, x))), [ADD_RELU]),
    "torch.add": (tail(lambda b, y, x: torch.add(x, y).relu()), [ADD_RELU]),
    "add method": (tail(lambda b, y, x: y.add(x).relu()), [ADD_RELU]),
    "add_ method": (tail(lambda b, y, x: y.add_(x).relu_()), [ADD_RELU]),
    "add in place to a new tensor": (
        tail(lambda b, y, x: F.relu(add_in_place(b.other(x), y)), other=nn.Conv2d(*CONV)), [ADD_RELU],
    ),
    "add of a parameter": (tail(lambda b, y, x: F.relu(y + b.z), z=nn.Parameter(data(2))), [ADD_RELU]),
    "in place under another name": (tail(second_name), [RELU]),
    "identities around an add": (
        tail(lambda b, y, x: F.relu(b.id2(b.id1(y) + x)), id1=nn.Identity(), id2=nn.Identity()), [ADD_RELU],
    ),
    "the last of a Sequential": (Nested, [RELU, ADD_RELU]),
    # A branch that is not taken may read what could not be guarded.
    "only what runs counts": (times(lambda: 2 if FLAG else len(os.environ)), [RELU]),
    # The residual, h, is what an earlier fused call has made.
    "residual made by modules": (
        tail(lambda b, y, x: b.relu(b.bn2(b.conv2(h := b.relu(y))) + h), **SECOND), [RELU, ADD_RELU],
    ),
    "residual made by functions": (
        tail(lambda b, y, x: F.relu(b.bn2(b.conv2(h := F.relu(y))) + h), **SECOND), [RELU, ADD_RELU],
    ),
    "residual added in place": (
        tail(lambda b, y, x: F.relu_(add_in_place(b.bn2(b.conv2(h := F.silu(y))), h)), **SECOND),
        [("silu", False), ADD_RELU],
    ),
    "residual on the left": (
        tail(lambda b, y, x: F.relu((h := F.relu(y)) + b.id(b.bn2(b.conv2(h)))), **SECOND), [RELU, ADD_RELU],
    ),
    "residual and input": (
        tail(lambda b, y, x: F.relu(torch.add(b.bn2(h := F.relu(y)), h)), **SECOND), [RELU, ADD_RELU],
    ),
    "same layer again": (tail(lambda b, y, x: step(b.norm, step(b.norm, F.relu(y + x)))), 3 * [ADD_RELU]),
    "three layers": (tail(lambda b, y, x: step(b.bn3, step(b.bn2, F.relu(y + x))), **THIRD), 3 * [ADD_RELU]),
    "residual of a residual": (tail(residual_of_a_residual, **THIRD), 3 * [ADD_RELU]),
}  # fmt: skip
FUSABLE |= {
    name: (tail(lambda b, y, x: b.act(y), act=act), [(activation, False)])
    for name, (act, activation) in ACTIVATIONS.items()
}
