"""Subclasses of our layers, and layers with hooks, in torch.fx and torch.jit: nothing is recorded twice, and
a subclass is scripted as it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

import bnfast
from tests.support.convertible import Leaves
from tests.support.layers import assert_same, both_modes, data, step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
X = data(3, 4, 3, 2)


class Doubling(bnfast.BatchNorm2d):
    """Another forward, written so that torch.jit can read it."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * torch.nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )


class Around(bnfast.BatchNorm2d):
    """A forward that calls ours."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Named(bnfast.BatchNorm2d):
    """No forward of its own."""


def model(layer: type[nn.Module]) -> Any:
    return nn.Sequential(nn.Conv2d(4, 4, 1), layer(4), nn.ReLU())


HOOKS: dict[str, Callable[..., Any]] = {
    "register_forward_hook": lambda module, args, y: y + 1,
    "register_forward_pre_hook": lambda module, args: (args[0] + 1,),
}
TRACED = [
    *((bnfast.BatchNorm2d, hook, "with hooks") for hook in HOOKS),
    (Around, "", "Around cannot be traced with a forward of its own"),
    (Named, "", ""),
]


@both_modes
@pytest.mark.parametrize(("layer", "hook", "refused"), TRACED)
def test_fx_never_records_twice(layer: type[nn.Module], hook: str, refused: str, training: bool) -> None:
    """Recorded from within its call, a layer would have its hooks, or the forward around its own, once in the
    graph and once more in the call that the graph holds."""
    module, tracer = model(layer).train(training), torch.fx.Tracer()
    if hook:
        getattr(module[1], hook)(HOOKS[hook])
    if refused:
        with pytest.raises(TraceError, match=refused):
            tracer.trace(module)
        tracer = Leaves()  # the remedy that the error names
    graph = torch.fx.GraphModule(copy.deepcopy(module), tracer.trace(module))
    assert [n.op for n in graph.graph.nodes].count("call_module") == 3
    assert type(graph.get_submodule("1")) is type(module[1])
    assert_same(step(graph, X), step(module, X), rtol=1e-5, atol=2e-5)


def test_fx_needs_a_model_around_a_layer() -> None:
    with pytest.raises(TraceError, match="BatchNorm2d cannot be traced by itself"):
        torch.fx.symbolic_trace(bnfast.BatchNorm2d(4))


@both_modes
def test_a_subclass_is_scripted_as_it_is_or_not_at_all(training: bool) -> None:
    """Not as torch.nn's layer, which would leave its forward out."""
    module = model(Doubling).train(training)
    expected, scripted = copy.deepcopy(module), torch.jit.script(module)
    assert_same(step(scripted, X), step(expected, X), rtol=1e-5, atol=2e-5)
    with pytest.raises(Exception, match="super|forward|batch_norm|[Cc]ompile"):
        torch.jit.script(model(Around))
