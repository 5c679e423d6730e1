"""What bnfast.revert makes of layers that torch.nn has no counterpart for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import bnfast
from bnfast.modules import plain
from bnfast.modules.frozenbatchnorm import TorchFrozenBatchNorm2d
from tests.support.convertible import BatchNormAct2d, DetectronFrozen
from tests.support.layers import LAYERS, Layer, assert_same, step

pytestmark = [pytest.mark.usefixtures("stand_ins"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if "Renorm" not in layer.name], ids=str)
def test_an_activation_reverts_to_plain_torch(layer: Layer, launches: list[Any]) -> None:
    """The plain layer has the same keys and numbers and launches no kernel; and it converts again."""
    ours, x = layer.make(dtype=torch.float64, **(layer.tracks or {})), layer.input(dtype=torch.float64)
    ours.activation = bnfast.Activation("leaky_relu", 0.3)
    theirs = bnfast.revert(copy.deepcopy(ours))
    assert type(theirs) is getattr(plain, layer.name)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert repr(theirs) == repr(ours)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        before = len(launches)
        expected = step(theirs, x, lambda x: theirs(theirs(x), residual=x))
        assert len(launches) == before
        assert_same(step(ours, x, lambda x: ours(ours(x), residual=x)), expected)
        assert len(launches) > before
    with pytest.raises(ValueError, match="residual must have input's shape"):
        theirs(x, residual=x[:1])
    with pytest.raises(RuntimeError, match="which has no activation"):
        torch.jit.script(theirs)
    assert type(bnfast.convert(theirs)) is type(ours)
    assert theirs.activation == ours.activation


def test_an_activation_given_since_is_kept() -> None:
    """timm's layer gets a module that applies it; others become layers in plain torch."""
    cases = (
        (BatchNormAct2d(4, nn.ReLU()), BatchNormAct2d, torch.float32),
        (DetectronFrozen(4), plain.FrozenBatchNorm2d, torch.float16),
    )
    for layer, kind, dtype in cases:
        bnfast.convert(layer)
        layer.activation = bnfast.Activation("leaky_relu", 0.3)
        x = torch.randn(2, 4, 3, 3, dtype=dtype)
        expected = copy.deepcopy(layer)(x)
        assert type(bnfast.revert(layer)) is kind
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_renorm_becomes_batchnorm_and_says_so(
    activation: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    renorm = bnfast.BatchRenorm2d(4, warmup_steps=0, r_max_steps=1, d_max_steps=1, activation=activation)
    model = nn.Sequential(renorm).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64) + 1
    for _ in range(2):
        model(x)
    expected, state = model.eval()(x), list(model.state_dict())
    bnfast.revert(model)
    assert caplog.messages == [
        "revert: Batch Renormalization became BatchNorm, which is equal in eval only: 0"
    ]
    assert type(model[0]) is (nn.BatchNorm2d if activation is None else plain.BatchNorm2d)
    assert list(model.state_dict()) == state
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", bnfast.modules.__all__)
def test_without_an_activation_it_becomes_torchs(name: str) -> None:
    layer = bnfast.revert(getattr(bnfast, name)(*((2, 4) if name == "GroupNorm" else (4,))))
    like = name.replace("Renorm", "Norm")
    assert type(layer) is getattr(nn, like, TorchFrozenBatchNorm2d)
    assert type(bnfast.convert(layer)) is getattr(bnfast, like)


def test_frozen_without_an_activation_is_traced_and_scripted() -> None:
    """In plain torch, as it has no counterpart."""
    layer = bnfast.revert(bnfast.FrozenBatchNorm2d(4, dtype=torch.float64))
    model, x = nn.Sequential(layer), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
