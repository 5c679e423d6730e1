"""What bnfast.revert makes of layers that torch.nn has no counterpart for."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfast
from bnfast.modules import plain
from bnfast.modules.drop_in import DropIn
from tests.support.convertible import CONVOLUTIONS
from tests.support.foreign import BatchNormAct2d, DetectronFrozen, put_in_place
from tests.support.training import assert_same_training, record


@pytest.fixture(autouse=True)
def _others_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


# What has no counterpart in torch: (spatial dimensions, the layer)
OURS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "BatchNorm1d": (1, lambda: bnfast.BatchNorm1d(4, activation="relu")),
    "BatchNorm2d": (2, lambda: bnfast.BatchNorm2d(4, activation=("leaky_relu", 0.3))),
    "BatchNorm3d": (3, lambda: bnfast.BatchNorm3d(4, activation="silu")),
    "FrozenBatchNorm2d": (2, lambda: bnfast.FrozenBatchNorm2d(4, activation="elu")),
    "GroupNorm": (2, lambda: bnfast.GroupNorm(2, 4, activation="gelu")),
    "InstanceNorm1d": (1, lambda: bnfast.InstanceNorm1d(4, activation="mish")),
    "InstanceNorm2d": (2, lambda: bnfast.InstanceNorm2d(4, activation="tanh")),
    "InstanceNorm3d": (3, lambda: bnfast.InstanceNorm3d(4, affine=True, activation="sigmoid")),
    "LayerNorm": (2, lambda: bnfast.LayerNorm([5, 6], activation="hardswish")),
}


class Residual(nn.Module):
    """A convolution, and a layer that takes its output twice."""

    def __init__(self, dims: int, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = CONVOLUTIONS[dims](3, 4, 1, bias=False), layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(self.norm(x), residual=x)


@pytest.mark.parametrize("name", OURS)
def test_an_activation_reverts_to_plain_torch(name: str, launches: list[Any]) -> None:
    """With the same keys and numbers, and no kernel; then back to ours."""
    dims, make = OURS[name]
    torch.manual_seed(0)
    ours = Residual(dims, make()).double()
    theirs = bnfast.revert(copy.deepcopy(ours))
    assert type(theirs.norm) is getattr(plain, name)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert repr(theirs.norm) == repr(ours.norm)
    x = torch.randn(3, 3, *(5, 6, 2)[:dims], dtype=torch.float64)
    expected = record(copy.deepcopy(theirs), x, steps=1)
    assert not launches
    assert_same_training(record(ours, x, steps=1), expected)
    assert type(bnfast.convert(theirs).norm) is type(ours.norm)
    assert theirs.norm.activation == ours.norm.activation
    with pytest.raises(ValueError, match="residual must have input's shape"):
        bnfast.revert(theirs).norm(theirs.conv(x), residual=x)


def test_without_an_activation_ours_revert_to_torchs() -> None:
    layers = [bnfast.BatchNorm2d(4), bnfast.GroupNorm(2, 4), bnfast.LayerNorm(4), bnfast.InstanceNorm1d(4)]
    theirs = bnfast.revert(nn.Sequential(*layers))
    assert [type(m) for m in theirs] == [nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d]
    assert repr(theirs[0]) == repr(nn.BatchNorm2d(4))


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
    assert [r.getMessage() for r in caplog.records] == [
        "revert: Batch Renormalization became BatchNorm, which is equal in eval only: 0"
    ]
    assert type(model[0]) is (nn.BatchNorm2d if activation is None else plain.BatchNorm2d)
    assert list(model.state_dict()) == state
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_every_layer_of_ours_goes_back() -> None:
    for name in bnfast.modules.__all__:
        layer = getattr(bnfast, name)(*((2, 4) if name == "GroupNorm" else (4,)))
        assert not type(bnfast.revert(layer)).__name__.startswith("BatchRenorm")
        assert not isinstance(layer, DropIn)


def test_what_was_fused_is_undone_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    bnfast.revert(bnfast.fuse(model))
    assert type(model) is nn.Sequential
    assert type(model[1]) is nn.BatchNorm2d


def test_frozen_without_an_activation_is_traced_and_scripted() -> None:
    """In plain torch, as it has no counterpart."""
    layer = bnfast.revert(bnfast.FrozenBatchNorm2d(4, dtype=torch.float64))
    model, x = nn.Sequential(layer), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_subclasses_of_ours_are_left_by_both(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(bnfast.BatchNorm2d):
        pass

    layer = Mine(4)
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.revert(bnfast.convert(layer))
    assert type(layer) is Mine
    assert "Mine (a subclass of bnfast's): the model" in caplog.records[-1].getMessage()
