"""What in a graph is an activation that the layers know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from ..activation import Activation


def _hardtanh(low: float, high: float) -> Activation | None:
    return Activation("relu6") if (low, high) == (0, 6) else None


def _gelu(approximate: str) -> Activation:
    return Activation("gelu_tanh" if approximate == "tanh" else "gelu")


_NAMED: dict[type, str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Mish: "mish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}


def of_module(module: object) -> Activation | None:
    """The activation that calling a module is, as its attributes stand now; None for all other modules,
    subclasses of torch.nn's included."""
    kind = type(module)
    if kind in _NAMED:
        return Activation(_NAMED[kind])
    m: Any = module
    if kind in (nn.ReLU6, nn.Hardtanh):
        return _hardtanh(m.min_val, m.max_val)
    if kind is nn.LeakyReLU:
        return Activation("leaky_relu", float(m.negative_slope))
    if kind is nn.ELU:
        return Activation("elu", float(m.alpha))
    return _gelu(m.approximate) if kind is nn.GELU else None


class _Form:
    """How a function is called: what it takes after its input, with the defaults, and what that makes."""

    def __init__(self, make: Callable[..., Activation | None], **parameters: Any) -> None:
        self.make, self.parameters = make, parameters

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
        given = dict(zip((*self.parameters, "inplace"), args, strict=False)) | kwargs
        # Whether it writes in place does not matter: its input has no other use.
        given.pop("inplace", None)
        if given.keys() - self.parameters or any(isinstance(value, Node) for value in given.values()):
            return None
        return self.make(**(self.parameters | given))


def _plain(name: str) -> _Form:
    return _Form(lambda: Activation(name))


_HARDTANH = _Form(lambda min_val, max_val: _hardtanh(min_val, max_val), min_val=-1.0, max_val=1.0)
_LEAKY = _Form(lambda negative_slope: Activation("leaky_relu", float(negative_slope)), negative_slope=0.01)
_ELU = _Form(lambda alpha: Activation("elu", float(alpha)), alpha=1.0)
_FUNCTIONS: dict[Any, _Form] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), _plain("relu")),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), _plain("sigmoid")),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), _plain("tanh")),
    F.relu6: _plain("relu6"),
    F.silu: _plain("silu"),
    F.hardswish: _plain("hardswish"),
    F.hardsigmoid: _plain("hardsigmoid"),
    F.mish: _plain("mish"),
    F.gelu: _Form(lambda approximate: _gelu(approximate), approximate="none"),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _HARDTANH),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _LEAKY),
    **dict.fromkeys((F.elu, F.elu_), _ELU),
}


def of_node(node: Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that a node applies to its first argument, or None."""
    if node.op == "call_module":
        lone = len(node.args) == 1 and not node.kwargs
        return of_module(modules[str(node.target)]) if lone else None
    form = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    return form.read(node.args[1:], node.kwargs) if form and node.args else None
