"""Every layer takes an activation, which it holds, shows and copies, and a residual, which must be as the
input is. Every function takes what the layers take."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from bnfast.activation import Activation
from tests.support.layers import Layer, data, every_layer, every_norm, every_path, norms, tracking

in_words = pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(0.3), "LeakyReLU", F.silu, nn.GELU],
    ids=["module", "name", "function", "class"],
)


@in_words
@every_layer
def test_layers_hold_the_record(layer: Layer, activation: Any) -> None:
    """No module becomes part of the layer: the same keys and children as without."""
    module, meant = layer.ours(*layer.arguments, activation=activation), Activation.of(activation)
    assert meant is not None
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.activation == meant
        assert type(other.activation) is Activation
        assert not list(other.children())
        assert other.state_dict().keys() == layer.ours(*layer.arguments).state_dict().keys()
        assert f"activation={tuple(meant) if meant.parameter else meant.name}" in repr(other)


@every_layer
def test_an_activation_given_later(layer: Layer) -> None:
    plain = layer.make(**(layer.tracks or {}))
    assert plain.activation is None
    assert "activation" not in repr(plain)
    module = copy.deepcopy(plain)
    module.activation = Activation.of(("leaky_relu", 0.2))
    x, z = layer.input(), layer.input(1)
    expected = F.leaky_relu(copy.deepcopy(plain)(x) + z, 0.2)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert "activation=('leaky_relu', 0.2)" in repr(other)
        assert other.state_dict().keys() == plain.state_dict().keys()
        assert_close(copy.deepcopy(other)(x, residual=z), expected)
    module.activation = Activation.of("silu")
    assert "activation=silu" in repr(module)
    with pytest.raises(RuntimeError, match="activation|BatchRenorm"):
        torch.jit.script(module)


@tracking
def test_running_statistics_are_those_of_the_layer_alone(layer: Layer) -> None:
    plain = layer.make(**(layer.tracks or {}))
    fused = copy.deepcopy(plain)
    fused.activation = Activation.of("relu")
    plain(layer.input())
    fused(layer.input(), residual=layer.input(1))
    assert_close(fused.state_dict(), plain.state_dict(), rtol=0, atol=0)


WRONG_RESIDUALS = {
    "shape": (lambda x: x[:1], ValueError, "shape"),
    "broadcast": (lambda x: x[:, :1], ValueError, "shape"),
    "dtype": (lambda x: x.double(), ValueError, "dtype"),
    "device": (lambda x: x.to("meta"), ValueError, "device"),
    "number": (lambda x: 1.0, TypeError, "Tensor or None"),
}


@every_path
@pytest.mark.parametrize(("wrong", "error", "named"), WRONG_RESIDUALS.values(), ids=WRONG_RESIDUALS.keys())
@every_layer
def test_a_residual_is_as_input_is(
    layer: Layer, wrong: Any, error: type[Exception], named: str, path: str
) -> None:
    module, x = layer.make(**(layer.tracks or {})), layer.input()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=f"residual.*{named}"):
        module(x, residual=wrong(x))
    assert_close(module.state_dict(), before, rtol=0, atol=0)


@in_words
@every_norm
def test_functions_take_the_same(norm: str, activation: Any) -> None:
    x, function, meant = data(2, 4, 3, 5), norms(norm)[0], Activation.of(activation)
    assert meant is not None
    assert_close(function(x, activation=activation), function(x, activation=meant), rtol=0, atol=0)
    assert_close(function(x, activation=activation), meant.apply(function(x)))
