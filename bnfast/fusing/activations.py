"""Recognizes, in an fx graph, the activations that the kernels apply."""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from ..kernels.epilogue import FUNCTIONS, Activation, of_module


def of_node(node: Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that a node applies to its first argument, or None."""
    if node.op == "call_module":
        lone = len(node.args) == 1 and not node.kwargs
        return of_module(modules[str(node.target)]) if lone else None
    form = FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if form is None or not node.args:
        return None
    given = dict(zip((*form.parameters, "inplace"), node.args[1:], strict=False)) | node.kwargs
    given.pop("inplace", None)  # it does not matter, for its input has no other use
    if given.keys() - form.parameters or any(isinstance(value, Node) for value in given.values()):
        return None
    return form.make(**(form.parameters | given))
