"""Recognizes, in an fx graph, the activations that the kernels apply."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Node

from ..kernels.epilogue import FUNCTIONS, Activation, Form, of_module


def still(module: object, activation: Activation) -> bool:
    """Whether calling the module still applies this activation."""
    return of_module(module) == activation


def _read(form: Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
    """The activation that a function applies with these arguments after its input."""
    given = dict(zip((*form.parameters, "inplace"), args, strict=False)) | kwargs
    # Whether it writes in place does not matter: its input has no other use.
    given.pop("inplace", None)
    if given.keys() - form.parameters or any(isinstance(value, Node) for value in given.values()):
        return None
    return form.make(**(form.parameters | given))


def of_node(node: Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that a node applies to its first argument, or None."""
    if node.op == "call_module":
        lone = len(node.args) == 1 and not node.kwargs
        return of_module(modules[str(node.target)]) if lone else None
    form = FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    return _read(form, node.args[1:], node.kwargs) if form and node.args else None
