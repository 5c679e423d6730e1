"""The activations themselves, at their corners and far away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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


@every_path
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ALL, ids=str)
def test_value_and_slope(activation: Any, dtype: torch.dtype, path: str) -> None:
    """Within a few units of the value, or of v where terms of v's size cancel, as torch's own formulas.

    In fp32, exp(v) is off by more the larger v is: rounding v * log2(e) and its constant moves it by up to
    (1/2 + 1/9) * |v| units. Where that shows in a small value it is allowed for: to take it back costs 4
    instructions an element, beside the 6 of silu, in kernels that are bound by them."""
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


@pytest.mark.parametrize("name", ["elu", "gelu", "gelu_tanh", "mish", "sigmoid", "silu", "tanh"])
def test_everywhere_as_exact_as_torch(name: str) -> None:
    """In fp32: errors are at most twice those of torch's own formulas and a few units, densely sampled."""
    near, far = torch.linspace(-1.0, 1.0, 1501), torch.linspace(-30.0, 30.0, 2501)
    small = torch.logspace(-7, 0, 400)
    v = torch.cat((near, far, small, -small)).requires_grad_()
    act, true = Activation.of(name), v.detach().double().requires_grad_()
    with_torch = v.detach().clone().requires_grad_()
    found, y, expected = through_kernels(v, name), act.apply(with_torch), act.apply(true)
    slopes = [
        torch.autograd.grad(of.sum(), at)[0]
        for of, at in ((found, v), (y, with_torch), (expected, true))
    ]  # fmt: skip
    at_v = name in ("gelu", "gelu_tanh", "mish", "silu")  # which are v times what is off
    sizes = (true.detach().abs().clamp(max=10) if at_v else 0.0) + expected.detach().abs()
    exponents = true.detach().abs() * (5 / 8) if name == "sigmoid" else 0.0
    unit = torch.finfo(torch.float32).eps
    for ours, torchs, exact, scale, more in (
        (found, y, expected, sizes, exponents),
        (*slopes, 1.0 + slopes[2].abs(), 0.0),
    ):
        theirs = ((torchs.double() - exact).abs() / (unit * scale)).nan_to_num().max()
        off = (ours.double() - exact).abs()
        assert (off <= (2 * theirs + 3 + more) * unit * scale + 1e-37).all(), (off / scale / unit).max()


@every_path
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_far_away(activation: str, dtype: torch.dtype, path: str) -> None:
    """Where squares and powers are infinite, values and slopes are what they tend to."""
    v = torch.tensor([1e3, 1e6, 1e12, -1e3, -1e6, -1e12], dtype=dtype, requires_grad=True)
    y = through_kernels(v, activation)
    (slope,) = torch.autograd.grad(y.sum(), v)
    true = v.detach().double().requires_grad_()
    expected = Activation.of(activation).apply(true)
    (expected_slope,) = torch.autograd.grad(expected.sum(), true)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-6, atol=1e-9)


@every_path
@pytest.mark.parametrize("activation", NAMES)
def test_what_is_no_number_stays_none(activation: str, path: str) -> None:
    v = torch.tensor([NAN, 1.0, -1.0], requires_grad=True)
    y = through_kernels(v, activation)
    assert y.isnan().tolist() == [True, False, False]
    (slope,) = torch.autograd.grad(y.sum(), v)
    assert slope[1:].isfinite().all()
    if activation in ("gelu", "gelu_tanh", "mish", "sigmoid", "silu", "tanh"):
        assert slope[0].isnan()


@every_path
@pytest.mark.parametrize("activation", NAMES)
def test_subnormal_numbers(activation: str, path: str) -> None:
    v = torch.tensor([0.0, 1e-40, -1e-40], requires_grad=True)
    y = through_kernels(v, activation)
    (slope,) = torch.autograd.grad(y.sum(), v)
    expected = Activation.of(activation).apply(v.detach())
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    assert slope.isfinite().all()


@pytest.mark.parametrize("activation", NAMES)
def test_infinity(activation: str) -> None:
    """Below, v times a slope of 0 is no number."""
    product = activation in ("gelu", "gelu_tanh", "hardswish", "mish", "silu")
    v = torch.tensor([INF] if product else [INF, -INF])
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
