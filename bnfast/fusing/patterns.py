"""Finds the layers in a block's graph that an activation follows."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node

from ..kernels.epilogue import FUNCTIONS, Activation, of_module
from .guards import known, returns_new
from .layers import NORMS, hooked, why_not_called, why_not_ours
from .symbols import add_in_place

THE_OUTPUT = "its output is the block's"
_ADDS = (operator.add, add_in_place, torch.add, "add", "add_")
_ADDS_IN_PLACE = (add_in_place, "add_")


class _Unfused(Exception):
    """Raised with the reason why a layer's call cannot be fused."""


class Match(NamedTuple):
    """A layer's call and the operations after it, in `steps`: Identities, at most one add, and the
    activation."""

    norm: Node
    steps: tuple[Node, ...]
    add: Node | None
    residual: Node | None
    activation: Activation

    def residual_now(self) -> Any:
        """The residual, or the node that has replaced it in the graph."""
        if self.add is None:
            return None
        place = self.steps.index(self.add)
        return _other_operand(self.add, self.steps[place - 1] if place else self.norm)


def find(graph: Graph, modules: dict[str, nn.Module]) -> tuple[list[Match], dict[Node, str]]:
    """Returns everything that can be fused, and why each of the other layers' calls cannot. Where both
    operands of an add are calls of layers, the add is fused with the one that is nested less deeply, for the
    other is usually a shortcut."""
    matches: dict[Node, Match] = {}
    reasons: dict[Node, str] = {}
    norms = [n for n in graph.nodes if n.op == "call_module" and isinstance(modules[str(n.target)], NORMS)]
    taken: dict[Node | None, str] = {}  # by add
    for node in sorted(norms, key=lambda n: str(n.target).count(".")):
        try:
            match = _follow(node, modules)
            if match.add in taken:
                raise _Unfused(f"it is the residual of {taken[match.add]}")
        except _Unfused as why:
            reasons[node] = str(why)
            continue
        matches[node] = match
        if match.add is not None:
            taken[match.add] = str(node.target)
    return [matches[node] for node in norms if node in matches], reasons


def _follow(norm: Node, modules: dict[str, nn.Module]) -> Match:
    reason = why_not_ours(modules[str(norm.target)])
    if reason is not None:
        raise _Unfused(reason)
    if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], Node):
        raise _Unfused("it is called with more than an input")
    steps: list[Node] = []
    add = residual = None
    current = norm
    while True:
        if len(current.users) != 1:
            raise _Unfused("its output has another use" if current.users else "its output is not used")
        current, previous = next(iter(current.users)), current
        called = modules[str(current.target)] if current.op == "call_module" else None
        if called is not None and hooked(called):
            raise _Unfused(why_not_called(called, f"{type(called).__name__} ({current.target})"))
        if current.args and current.args[0] is previous:
            activation = _activation(current, modules)
            if activation is not None:
                return Match(norm, (*steps, current), add, residual, activation)
        if type(called) is not nn.Identity:
            if add is not None or current.target not in _ADDS:
                raise _Unfused(_followed_by(current, modules))
            add, residual = current, _other_operand(current, previous)
            if residual is None:
                what = f"no other tensor of the block, or is scaled ({current.format_node()})"
                raise _Unfused(f"what is added to it is {what}")
            _refuse_a_later_call(norm, add, residual, steps, modules)
        steps.append(current)


def _activation(node: Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that a node applies to its first argument, or None."""
    if node.op == "call_module":
        lone = len(node.args) == 1 and not node.kwargs
        return of_module(modules[str(node.target)]) if lone else None
    form = FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if form is None:
        return None
    given = dict(zip((*form.parameters, "inplace"), node.args[1:], strict=False)) | node.kwargs
    given.pop("inplace", None)  # it does not matter, for its input has no other use
    if given.keys() - form.parameters or any(isinstance(value, Node) for value in given.values()):
        return None
    return form.make(**(form.parameters | given))


def _followed_by(node: Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "output":
        return THE_OUTPUT
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} ({node.target}) follows it, and no activation"
    return f"{getattr(node.target, '__name__', node.target)} follows it, and no activation"


def _other_operand(add: Node, ours: Node) -> Node | None:
    if len(add.args) != 2 or add.kwargs.get("alpha", 1) != 1 or add.kwargs.keys() - {"alpha"}:
        return None
    left, right = add.args
    other = right if left is ours else left
    return other if isinstance(other, Node) and other is not ours else None


def writes_to(residual: Node | None, add: Node | None) -> bool:
    """Whether an add writes its result to the residual."""
    return add is not None and add.target in _ADDS_IN_PLACE and add.args[0] is residual


def _refuse_a_later_call(
    norm: Node, add: Node, residual: Node, steps: list[Node], modules: dict[str, nn.Module]
) -> None:
    """Raises _Unfused if the layer's call cannot move to the place of the add, as it does with a residual. No
    operation between the two may write to the layer's input, or observe that the layer has not run yet. No
    operation after the add may write to the residual, which the layer may save for its backward."""
    counted = {id(buffer) for buffer in modules[str(norm.target)].buffers()}
    for node in norm.graph.find_nodes(op="get_attr"):
        if id(operator.attrgetter(str(node.target))(modules[""])) in counted:
            raise _Unfused(f"forward reads {node.target} too")
    nodes = list(norm.graph.nodes)
    for node in nodes[nodes.index(norm) + 1 : nodes.index(add)]:
        if node.op == "call_module" and counted & set(map(id, modules[str(node.target)].buffers())):
            raise _Unfused(f"it runs again, or its buffers are used, as {node.target}, before the add")
        if node not in steps and _may_write(node, modules):
            raise _Unfused(f"{node.name}, before the add, may write in place")
    for node in nodes[nodes.index(add) + 1 :]:
        if residual in node.all_input_nodes and _may_write(node, modules):
            raise _Unfused(f"{node.name} may write to what was added to it")
    if writes_to(residual, add):
        fresh = residual.op == "call_module" and returns_new(modules[str(residual.target)])
        if not fresh or len(residual.users) != 1:
            raise _Unfused("it is added in place to a tensor that is in use elsewhere")


def _may_write(node: Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) or not known(m) for m in modules[str(node.target)].modules())
    if node.op in ("placeholder", "get_attr"):
        return False
    if any(value is True for value in node.args) or node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if isinstance(node.target, str):
        return node.target.endswith("_")
    # A function of another library may write to anything.
    name = getattr(node.target, "__name__", "")
    torchs = (getattr(node.target, "__module__", None) or "torch").startswith("torch")
    return node.target not in _READS and (not torchs or name.endswith("_"))


_READS = (getattr, operator.add, operator.sub, operator.mul, operator.truediv, operator.getitem)
