"""The activations themselves, at their corners and far away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from bnfast.activation import NAMES, Activation
from bnfast.functional import batch_norm
from tests.support.layers import every_path

pytestmark = pytest.mark.compiled

ALL = (*NAMES, ("leaky_relu", 0.2), ("leaky_relu", -1.5), ("elu", 0.5), ("elu", -0.5))
INF, NAN = float("inf"), float("nan")
# around every corner, where terms cancel, where exp overflows, and what is no number
VALUES = (
    0.0, 1e-30, 1e-6, 1e-3, 0.1, 0.6, 0.625, 0.65, 1.0, 2.5, 3.0, 3.5, 5.9, 6.0, 6.5, 19.0, 21.0, 71.0, 80.0,
    200.0,
)  # fmt: skip


def values(dtype: torch.dtype) -> Tensor:
    v = torch.tensor(VALUES, dtype=dtype)
    return torch.cat((v, -v)).requires_grad_()


def through_kernels(v: Tensor, activation: Any) -> Tensor:
    """The activation of v, by way of a normalization that changes nothing."""
    zero, one = torch.zeros(1, dtype=v.dtype), torch.ones(1, dtype=v.dtype)
    return batch_norm(v[None, None], zero, one, None, None, False, 0.0, 1e-30, activation=activation)[0, 0]


def gpu_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, exp in fp32 is what a GPU makes of it: 2 to the power of a rounded product."""

    def exp(v: np.ndarray) -> np.ndarray:
        if v.dtype != np.float32:
            return np.exp(v)
        return np.exp2((v * np.float32(np.log2(np.e))).astype(np.float64)).astype(np.float32)

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_exp", lambda self, v: self.unary_op(v, exp))


@pytest.mark.parametrize("path", ["kernels", "kernels as on a GPU", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ALL, ids=str)
def test_value_and_slope(
    activation: Any, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a few units of the value, or of v where terms of v's size cancel, as torch's own formulas.

    A GPU's exp(v) is off by more the larger v is: rounding v * log2(e) and its constant moves it by up to
    (1/2 + 1/9) * |v| units. Where that shows in a small value it is allowed for: to take it back costs 4
    instructions an element, beside the 14 of silu, in kernels that are bound by them."""
    if path == "kernels as on a GPU":
        gpu_exp(monkeypatch)
    v = values(dtype)
    y = through_kernels(v, activation)
    (slope,) = torch.autograd.grad(y.sum(), v)
    true = v.detach().double().requires_grad_()
    act = Activation.of(activation)
    expected = act.apply(true)
    (expected_slope,) = torch.autograd.grad(expected.sum(), true)
    if act.name == "hardsigmoid" and path != "torch":  # torch's is the fp32 number next to 1/6, in fp64 too
        expected_slope = expected_slope.sign() / 6
    unit = torch.finfo(dtype).eps
    sizes = expected.abs() + true.abs().clamp(max=10) * act.name.startswith(("gelu", "silu", "mish"))
    exponents = true.abs() * (5 / 8) if act.name == "sigmoid" and path != "torch" else 0.0
    assert ((y.double() - expected).abs() <= unit * (8 + exponents) * sizes + 1e-37).all()
    at_corners = (true.abs() == 3) & (act.name in ("hardswish", "hardsigmoid"))
    apart = (slope.double() - expected_slope).abs()
    assert (at_corners | (apart <= 16 * unit * (1 + expected_slope.abs()))).all()


@every_path
@pytest.mark.parametrize("activation", NAMES)
def test_what_is_no_number_stays_none(activation: str, path: str) -> None:
    v = torch.tensor([NAN, 1.0, -1.0], requires_grad=True)
    y = through_kernels(v, activation)
    assert y.isnan().tolist() == [True, False, False]
    (slope,) = torch.autograd.grad(y.sum(), v)
    assert slope[1:].isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardsigmoid", "sigmoid", "tanh"])
def test_infinity(activation: str) -> None:
    v = torch.tensor([INF, -INF])
    torch.testing.assert_close(through_kernels(v, activation), Activation.of(activation).apply(v))


@every_path
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid"])
def test_infinite_gradients(activation: str, path: str) -> None:
    """Where the slope is 0 they end, as in torch."""
    v = torch.tensor([-4.0, -3.0, -1.0, 0.0, 1.0, 7.0], requires_grad=True)
    dy = torch.full_like(v, INF)
    (expected,) = torch.autograd.grad(Activation.of(activation).apply(v), v, dy)
    (found,) = torch.autograd.grad(through_kernels(v, activation), v, dy)
    if activation == "hardswish":  # at its corners, -3 among them, either side's slope will do
        expected, found = expected[v != -3], found[v != -3]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("activation", ALL, ids=str)
def test_slope_in_plain_torch(activation: Any) -> None:
    """What double backward differentiates."""
    act = Activation.of(activation)
    v = values(torch.float64)
    (expected,) = torch.autograd.grad(act.apply(v).sum(), v)
    if act.name == "hardsigmoid":
        expected = expected.sign() / 6
    keep = v.detach().abs() != 3
    torch.testing.assert_close(act.slope(v).detach()[keep], expected[keep], rtol=1e-12, atol=1e-12)
    smooth = torch.tensor([-4.3, -2.1, -0.7, 0.3, 1.9, 4.2, 7.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(act.slope, smooth)
