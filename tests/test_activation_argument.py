"""What `activation=` takes, in layers and in functions, and what it refuses. What layers make of it is in
tests/contract/test_activation.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from bnfast.activation import NAMES, PARAMETERS, Activation
from bnfast.functional import batch_norm
from tests.support.layers import KINDS, NORMS, every_path, norms

INF, NAN = float("inf"), float("nan")
LARGEST = torch.finfo(torch.float32).max


class OwnReLU(nn.ReLU):
    """As a user may have it: who knows what its forward is."""


def hooked() -> nn.Module:
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    return module


def other_forward() -> nn.Module:
    module = nn.ReLU()
    module.forward = torch.neg  # type: ignore[method-assign, assignment]
    return module


ALIKE: list[tuple[Any, Activation]] = [
    *(((name, PARAMETERS.get(name, 0.0)), Activation(name, PARAMETERS.get(name, 0.0))) for name in NAMES),
    ("ReLU", Activation("relu")),
    ("SiLU", Activation("silu")),
    ("swish", Activation("silu")),
    ("Swish", Activation("silu")),
    ("hard_swish", Activation("hardswish")),
    ("Hardswish", Activation("hardswish")),
    ("hard_sigmoid", Activation("hardsigmoid")),
    ("LeakyReLU", Activation("leaky_relu", 0.01)),
    ("leakyrelu", Activation("leaky_relu", 0.01)),
    (("LeakyReLU", 0.2), Activation("leaky_relu", 0.2)),
    (("leaky_relu", 1), Activation("leaky_relu", 1.0)),
    (Activation("ReLU"), Activation("relu")),
    (nn.ReLU, Activation("relu")),
    (nn.ReLU6, Activation("relu6")),
    (nn.LeakyReLU, Activation("leaky_relu", 0.01)),
    (nn.ELU, Activation("elu", 1.0)),
    (nn.GELU, Activation("gelu")),
    (nn.Mish, Activation("mish")),
    (nn.ReLU(inplace=True), Activation("relu")),
    (nn.ReLU6(), Activation("relu6")),
    (nn.Hardtanh(0.0, 6.0), Activation("relu6")),
    (nn.LeakyReLU(0.3), Activation("leaky_relu", 0.3)),
    (nn.ELU(0.5), Activation("elu", 0.5)),
    (nn.GELU("tanh"), Activation("gelu_tanh")),
    (nn.SiLU(), Activation("silu")),
    (nn.Hardswish(), Activation("hardswish")),
    (nn.Hardsigmoid(), Activation("hardsigmoid")),
    (nn.Sigmoid(), Activation("sigmoid")),
    (nn.Tanh(), Activation("tanh")),
    (F.relu, Activation("relu")),
    (torch.relu, Activation("relu")),
    (torch.relu_, Activation("relu")),
    (F.relu6, Activation("relu6")),
    (F.silu, Activation("silu")),
    (F.gelu, Activation("gelu")),
    (F.leaky_relu, Activation("leaky_relu", 0.01)),
    (F.elu, Activation("elu", 1.0)),
    (torch.sigmoid, Activation("sigmoid")),
    (torch.tanh, Activation("tanh")),
]
REFUSED: list[Any] = [
    "", "relu7", "softplus", 3, len, True, ("relu", 0.1), ("leaky_relu", "a"), ("leaky_relu", 0.1, 0.2), (),
    ["relu"], {"relu": 1}, ("leaky_relu", True), ("leaky_relu", 10**400), ("leaky_relu", torch.tensor(0.1)),
    *((name, slope) for name in PARAMETERS for slope in (NAN, INF, -INF, 2 * LARGEST)),
    nn.LeakyReLU(NAN), nn.ELU(INF), nn.LeakyReLU(torch.tensor(0.1)), nn.Hardtanh(-1, 1), nn.Hardtanh,  # type: ignore[arg-type]
    nn.PReLU(), nn.PReLU, nn.Softplus(), nn.Module, OwnReLU(), OwnReLU, hooked(), other_forward(),
    F.hardtanh, F.softplus, torch.neg,
]  # fmt: skip


def shown(value: Any) -> str:
    """Without addresses: workers must agree on what a test is called."""
    return getattr(value, "__name__", None) or repr(value)


@pytest.mark.parametrize(("given", "meant"), ALIKE, ids=shown)
def test_one_record_for_all_spellings(given: Any, meant: Activation) -> None:
    found = Activation.of(given)
    assert type(found) is Activation
    assert found == meant
    assert Activation.of(found) == found
    v = torch.linspace(-8, 8, 33, dtype=torch.float64)
    if isinstance(given, type):
        given = given()
    if callable(given) and not isinstance(given, tuple):
        torch.testing.assert_close(found.apply(v), given(v.clone()), rtol=0, atol=0)


def test_none_is_none() -> None:
    assert Activation.of(None) is None


@pytest.mark.parametrize("wrong", REFUSED, ids=shown)
def test_what_it_may_not_be(wrong: Any) -> None:
    mean, variance = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match="^activation "):
        batch_norm(torch.randn(2, 4, 5), mean, variance, training=True, activation=wrong)
    assert mean.eq(0).all(), "the batch was counted"
    for layer in KINDS:
        with pytest.raises(ValueError, match="^activation "):
            layer.ours(*layer.arguments, activation=wrong)
    for name in NORMS:
        with pytest.raises(ValueError, match="^activation "):
            norms(name)[0](torch.randn(2, 4, 5), activation=wrong)


@pytest.mark.parametrize("wrong", [nn.Hardtanh(-1, 1), nn.PReLU(), "softplus"], ids=shown)
def test_the_message_has_the_list_and_what_came(wrong: Any) -> None:
    with pytest.raises(ValueError, match="relu, relu6, leaky_relu, .*tanh") as raised:
        Activation.of(wrong)
    assert repr(wrong) in str(raised.value)


def test_the_message_has_the_range() -> None:
    with pytest.raises(ValueError, match=r"leaky_relu.*between -3\.4e38 and 3\.4e38, but got .*nan"):
        Activation.of(("leaky_relu", NAN))


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.3), "LeakyReLU", F.silu, nn.GELU], ids=shown)
def test_compiled(activation: Any) -> None:
    """Without a graph break, the argument being part of what is compiled."""
    x = torch.randn(2, 4, 3, 5)
    torch._dynamo.reset()
    function = norms("batch")[0]
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, activation=activation), function(x, activation=activation))


@every_path
@pytest.mark.parametrize(
    "activation", [("leaky_relu", -2.0), ("leaky_relu", LARGEST), ("elu", -0.5), ("elu", 0.0)], ids=shown
)
def test_the_whole_range_is_right(activation: Any, path: str) -> None:
    """Forward and backward find the side of 0 from x, so the slope below it may have either sign."""
    name, parameter = activation
    x = torch.tensor([-3.0, -0.5, -0.0, 0.0, 0.5, 3.0], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    tiny = 1e-30  # which 1 + tiny has no digits for
    y = batch_norm(x[None, None], zero, one, None, None, False, 0.0, tiny, activation=activation)[0, 0]
    (slope,) = torch.autograd.grad(y.sum(), x)
    v = x.detach().double()
    low = v if name == "leaky_relu" else v.exp() - 1
    low_slope = torch.ones_like(v) if name == "leaky_relu" else v.exp()
    positive = v > 0
    expected = torch.where(positive, v, parameter * low)
    expected_slope = torch.where(positive, torch.ones_like(v), parameter * low_slope)
    torch.testing.assert_close(y.detach(), expected.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope, expected_slope.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(NAN), nn.LeakyReLU(INF), nn.ELU(-INF), nn.LeakyReLU(torch.tensor(0.1))],  # type: ignore[arg-type]
    ids=shown,
)
def test_fuse_leaves_such_a_module_alone(activation: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), activation)
    x = torch.randn(2, 4, 3, 3)
    expected = copy.deepcopy(model)(x)
    bnfast.fuse(model)
    assert "0 fused, 1 not" in str(bnfast.fusion_report(model))
    torch.testing.assert_close(model(x), expected, equal_nan=True)


@pytest.mark.parametrize("slope", [NAN, INF])
def test_fuse_leaves_such_a_function_alone(slope: float) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.norm(x), slope)

    model = bnfast.fuse(Block())
    assert "0 fused, 1 not" in str(bnfast.fusion_report(model))
    torch.testing.assert_close(model(torch.randn(2, 4, 3, 3)).isfinite().all(), torch.tensor(False))
