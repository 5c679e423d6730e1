"""The function that a rewritten forward calls in place of a layer and the operations after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Graph, Node

from ..kernels.epilogue import Activation, of_module
from .layers import hooked, hooked_everywhere, why_not_ours
from .patterns import Match


class Step(NamedTuple):
    """One operation of the original forward after the layer, applied to the result of the operation before
    it."""

    function: Callable[..., Any] | None  # None: the next one of the site's modules
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class Site(NamedTuple):
    """One call of a layer and what is fused with it. norm, modules: paths in the block. modules: those that
    the steps call, in order."""

    norm: str
    modules: tuple[str, ...]
    steps: tuple[Step, ...]
    activation: Activation
    residual: bool


# In a step's arguments: the result of the step before, and the residual.
LAST, RESIDUAL = "<last>", "<residual>"


def site_of(match: Match) -> Site:
    steps, previous = [], match.norm
    for node in match.steps:
        # Each step is on the chain, so its arguments can have no nodes but these two.
        names = {previous: LAST, match.residual: RESIDUAL}
        args = tuple(names[a] if isinstance(a, Node) else a for a in node.args)
        kwargs = tuple((key, names[a] if isinstance(a, Node) else a) for key, a in node.kwargs.items())
        target = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
        steps.append(Step(target if callable(target) else None, args, kwargs))
        previous = node
    called = tuple(str(node.target) for node in match.steps if node.op == "call_module")
    return Site(str(match.norm.target), called, tuple(steps), match.activation, match.add is not None)


def rewrite(graph: Graph, match: Match, site: Site) -> None:
    """Replaces a match's nodes by one call, at the place of the layer's call or, with a residual, of the add.
    It takes its inputs from the graph as it is now, for an input that the match has stored may have been
    rewritten."""
    with graph.inserting_before(match.add or match.norm):
        modules = [graph.get_attr(name) for name in (site.norm, *site.modules)]
        tensors = (match.norm.args[0], match.residual_now())
        call = graph.call_function(caller(site), (modules[0], *tensors, *modules[1:]))
    last = match.steps[-1]
    last.replace_all_uses_with(call)
    for node in reversed((match.norm, *match.steps)):
        graph.erase_node(node)


def caller(site: Site) -> Callable[..., Tensor]:
    def fused_call(norm: Any, input: Tensor, residual: Tensor | None, *modules: nn.Module) -> Tensor:
        if why_unfused(site, norm, modules) is None and _alike(input, residual):
            output: Tensor = norm.normalize(input, site.activation, residual)
            return output
        return _one_by_one(site, norm(input), residual, modules)

    return fused_call


def why_unfused(site: Site, norm: nn.Module, modules: tuple[nn.Module, ...]) -> str | None:
    """Why the original operations must run: what has changed on the modules of a site since it was fused."""
    reason = "there are hooks on all modules" if hooked_everywhere() else why_not_ours(norm)
    if reason is not None:
        return reason
    activates = site.steps[-1].function is None  # whether the last module is the activation
    for i, module in enumerate(modules):
        if hooked(module):
            return "there are hooks on what follows it, or it has a forward or a compiled call of its own"
        if activates and i == len(modules) - 1:
            if of_module(module) != site.activation:
                return "its activation was changed"
        elif type(module) is not nn.Identity:
            return "an Identity after it was replaced"
    return None


def _alike(input: Tensor, residual: Tensor | None) -> bool:
    """Whether the layer takes this residual: an add would broadcast, or change the dtype."""
    return residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


def _one_by_one(
    site: Site, output: Tensor, residual: Tensor | None, modules: tuple[nn.Module, ...]
) -> Tensor:
    """Runs the original operations; in-place ones work in place."""
    left = iter(modules)
    for function, given, kwargs in site.steps:
        tensors = {LAST: output, RESIDUAL: residual}
        args = [tensors[a] if a is LAST or a is RESIDUAL else a for a in given]
        named = {key: tensors[a] if a is LAST or a is RESIDUAL else a for key, a in kwargs}
        output = (next(left) if function is None else function)(*args, **named)
    return output
