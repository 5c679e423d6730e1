"""What torch.fx and torch.jit make of subclasses of our layers, and of layers with hooks: nothing is recorded
twice, and a subclass is scripted as it is written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.testing import assert_close

import bnfast
from tests.support.layers import both_modes, data, step

SHAPE = (3, 4, 3, 2)
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def model(layer: type[nn.Module] = bnfast.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 1), layer(4), nn.ReLU())


class Doubling(bnfast.BatchNorm2d):
    """More than a BatchNorm, and written so that torch.jit can read it."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * torch.nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )


class Around(bnfast.BatchNorm2d):
    """Something beside our forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Named(bnfast.BatchNorm2d):
    """A subclass that leaves the forward alone."""


class Leaves(torch.fx.Tracer):
    """The way out that the error names."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, bnfast.BatchNorm2d) or super().is_leaf_module(m, name)


@both_modes
def test_a_subclass_without_a_forward_is_a_leaf_to_fx(training: bool) -> None:
    module = model(Named).train(training)
    graph = torch.fx.symbolic_trace(copy.deepcopy(module))
    (node,) = (n for n in graph.graph.nodes if n.target == "1")
    assert node.op == "call_module"
    assert type(graph.get_submodule("1")) is Named
    assert_close(step(graph, data(*SHAPE)), step(module, data(*SHAPE)), **CLOSE)


@both_modes
def test_a_subclass_is_scripted(training: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = model(Doubling).train(training)
        expected, scripted = copy.deepcopy(module), torch.jit.script(module)
    x = data(*SHAPE)
    assert_close(step(scripted, x), step(expected, x), **CLOSE)


def hooked(register: str) -> nn.Module:
    module = model()
    hook: Callable[..., Any] = {
        "register_forward_hook": lambda module, args, y: y + 1,
        "register_forward_pre_hook": lambda module, args: (args[0] + 1,),
    }[register]
    getattr(module[1], register)(hook)
    return module


UNTRACEABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward hook": (lambda: hooked("register_forward_hook"), "with hooks"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), "with hooks"),
    "subclass": (lambda: model(Around), "Around cannot be traced with a forward of its own"),
    "layer by itself": (lambda: bnfast.BatchNorm2d(4), "BatchNorm2d cannot be traced by itself"),
}


@pytest.mark.parametrize(("make", "words"), UNTRACEABLE.values(), ids=UNTRACEABLE.keys())
def test_fx_never_records_twice(make: Callable[[], nn.Module], words: str) -> None:
    """Recorded from within its call, a layer would have its hooks once in the graph and once more in the call
    that the graph holds."""
    module = make()
    with pytest.raises(TraceError, match=words):
        torch.fx.symbolic_trace(module)


@pytest.mark.parametrize("name", ["forward hook", "forward pre-hook", "subclass"])
def test_fx_with_leaves_named(name: str) -> None:
    module = UNTRACEABLE[name][0]()
    graph = torch.fx.GraphModule(copy.deepcopy(module), Leaves().trace(module))
    assert [n.op for n in graph.graph.nodes].count("call_module") == 3
    assert_close(step(graph, data(*SHAPE)), step(module, data(*SHAPE)), **CLOSE)


def test_a_subclass_is_scripted_as_it_is_or_not_at_all() -> None:
    """Not as torch.nn's layer, which would leave its forward out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(Exception, match="super|forward|batch_norm|[Cc]ompile"):
            torch.jit.script(model(Around))
