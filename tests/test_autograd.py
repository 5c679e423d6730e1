"""Derivatives of every order: gradcheck and gradgradcheck in fp64, functorch transforms, forward mode,
penalties on gradients, anomaly mode, checkpointing. Where torch.nn's layer raises, ours raises the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bnfast
from bnfast.functional import batch_norm, layer_norm
from tests.support.layers import both_modes, every_path
from tests.support.layers import data as of_dtype


def data(*shape: int, seed: int = 0) -> Tensor:
    return of_dtype(*shape, seed=seed, dtype=torch.float64)


def layer(library: Any, training: bool = True, **options: Any) -> nn.Module:
    """BatchNorm1d of two channels, fp64, whatever the library; random where it is not constant."""
    module = library.BatchNorm1d(2, **options).double().train(training)
    with torch.no_grad():
        for n, t in enumerate(module.state_dict().values()):
            if t.is_floating_point():
                t.copy_(data(*t.shape, seed=n).abs() + 0.1)
    return module


def by_hand(x: Tensor, mean: Tensor, variance: Tensor, training: bool) -> Tensor:
    if training:
        mean = x.mean(0)
        variance = (x - mean).square().mean(0)
    return (x - mean) / (variance + 1e-5).sqrt()


@both_modes
def test_fourth_derivative(training: bool) -> None:
    """Judged by elementary operations. torch's own batch_norm cannot judge: in training, its third derivative
    leaves out how the batch statistics depend on x."""
    mean, variance = data(2, seed=5), data(2, seed=6).square() + 0.5

    def fourth(function: Callable[..., Tensor]) -> Tensor:
        x = data(3, 2).requires_grad_()
        result = function(x, mean.clone(), variance.clone(), training=training).pow(5).sum()
        for seed in (1, 2, 3, 4):
            (slope,) = torch.autograd.grad(result, x, create_graph=True)
            result = (slope * data(3, 2, seed=seed)).sum()
        return result

    expected = fourth(by_hand)
    assert expected.abs() > 1e-3
    assert_close(fourth(batch_norm), expected)


@pytest.mark.parametrize("dual", ["x", "weight", "running_mean", "gradient"])
@both_modes
def test_forward_mode(training: bool, dual: str) -> None:
    """Tangents through the input, a parameter, the statistics, and through backward, by way of dy."""

    def tangent(function: Callable[..., Tensor]) -> Any:
        given = {"x": data(4, 2), "running_mean": data(2, seed=1), "running_var": data(2, seed=2).abs() + 0.1}
        given["weight"], gradient = data(2, seed=3), data(4, 2, seed=4)
        if dual == "gradient":
            x = given.pop("x").requires_grad_()
            y = function(x, **given, training=training)
            with forward_ad.dual_level():
                gradient = forward_ad.make_dual(gradient, data(4, 2, seed=5))
                return forward_ad.unpack_dual(torch.autograd.grad(y, x, gradient)[0])
        with forward_ad.dual_level():
            given[dual] = forward_ad.make_dual(given[dual], data(*given[dual].shape, seed=5))
            return forward_ad.unpack_dual(function(given.pop("x"), **given, training=training))

    try:
        expected = tangent(F.batch_norm)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error).split(".")[0][:40]):
            tangent(batch_norm)
        return
    assert_close(tuple(tangent(batch_norm)), tuple(expected))


def critic(library: Any, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    modules = nn.Linear(3, 4), library.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
    return nn.Sequential(*modules).to(dtype)


@every_path
def test_gradient_penalty_step(path: str) -> None:
    """WGAN-GP: the loss holds the norm of a gradient. An opaque backward makes it silently wrong."""

    def trained(library: Any) -> dict[str, Tensor]:
        model = critic(library, torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in (1, 2):
            x = data(5, 3, seed=seed).requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            loss = model(x).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.state_dict()

    ours, theirs = trained(bnfast), trained(nn)
    assert (theirs["1.weight"] - 1).abs().max() > 1e-3
    assert_close(ours, theirs)


@both_modes
def test_double_backward_in_mixed_precision(training: bool) -> None:
    """bf16 activations, fp32 parameters: second-order gradients of their types, with fp64's values."""

    def second(dtype: torch.dtype, function: Callable[..., Tensor]) -> list[Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = data(6, 2, 3).bfloat16().to(dtype).requires_grad_()
        weight, bias, mean, variance = (data(2, seed=n).abs().float().to(wide) + 0.25 for n in (1, 2, 3, 4))
        dy, direction = (data(6, 2, 3, seed=n).bfloat16().to(dtype) for n in (5, 6))
        dy.requires_grad_()
        y = function(x, mean, variance, weight.requires_grad_(), bias.requires_grad_(), training=training)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        loss = (dx * direction).sum() + dweight.square().sum()
        return list(torch.autograd.grad(loss, (x, weight, dy)))

    ours, exact = second(torch.bfloat16, batch_norm), second(torch.float64, F.batch_norm)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for mine, true in zip(ours, exact, strict=True):
        assert (mine.double() - true).norm() <= 2e-2 * true.norm()


def test_anomaly_mode() -> None:
    """A sound backward passes; one that returns NaN is named, with the line of its forward."""
    module = layer(bnfast)
    with torch.autograd.set_detect_anomaly(True):
        module(data(4, 2).requires_grad_()).square().sum().backward()
        y = module(data(4, 2).requires_grad_())
        with (
            pytest.warns(
                UserWarning,
                match=r"(?s)Error detected in BatchNormBackward.*Traceback of forward call.*y = module",
            ),
            pytest.raises(RuntimeError, match="BatchNormBackward.* returned nan"),
        ):
            y.backward(torch.full_like(y, float("nan")))


@every_path
def test_training_step_between_eval_forward_and_its_backward(path: str) -> None:
    """It overwrites the running statistics that the eval forward used: no gradient may notice."""
    module, dy = layer(bnfast, training=False), data(4, 2, seed=7)

    def gradients(between: Callable[[], object]) -> tuple[Tensor, ...]:
        x = data(4, 2).requires_grad_()
        y = module.eval()(x)
        with torch.no_grad():
            between()
        return torch.autograd.grad(y, (x, module.weight, module.bias), dy)

    expected = gradients(lambda: None)
    mean = module.running_mean.clone()
    found = gradients(lambda: module.train()(100 * data(4, 2, seed=8)))
    assert not torch.equal(mean, module.running_mean)
    assert_close(found, expected, rtol=0, atol=0)


@every_path
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_updates_twice_as_torch(reentrant: bool, path: str) -> None:
    """Activation checkpointing runs the forward again: torch.nn counts such a batch twice, and so do we."""
    results = []
    for module in (layer(bnfast, momentum=None), layer(nn, momentum=None)):
        x = data(4, 2).requires_grad_()
        checkpoint(module, x, use_reentrant=reentrant).pow(3).sum().backward()
        results.append({"dx": x.grad, "dweight": module.weight.grad, **module.state_dict()})
    assert results[1]["num_batches_tracked"] == 2
    assert_close(*results)


@every_path
def test_two_forwards_then_their_backwards(path: str) -> None:
    """As of a discriminator that sees a real and a generated batch."""
    layer = bnfast.BatchNorm2d(3)
    batches = [torch.randn(4, 3, 5, 5).requires_grad_() for _ in range(2)]
    sum(layer(x).square().mean() * 2 for x in batches).backward()
    for x in batches:
        alone = x.detach().requires_grad_()
        (bnfast.BatchNorm2d(3)(alone).square().mean() * 2).backward()
        assert_close(x.grad, alone.grad)
    assert layer.num_batches_tracked == 2
    mean = sum(factor * x.detach().mean((0, 2, 3)) for factor, x in zip((0.09, 0.1), batches, strict=True))
    assert_close(layer.running_mean, mean)


@every_path
def test_who_saved_a_buffer_is_told(path: str) -> None:
    """A step changes it in place, for a gradient that needs what it was."""
    layer = bnfast.BatchNorm2d(3)
    y = layer.running_mean * torch.ones(3, requires_grad=True)
    layer(torch.randn(4, 3, 5, 5, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_path
def test_a_shape_that_changes_before_the_backward(path: str) -> None:
    """A list is the caller's, who may go on with it."""
    x, shape = torch.randn(4, 3, 6, requires_grad=True), [6]
    y = layer_norm(x, shape)
    shape.insert(0, 3)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(F.layer_norm(x, [6]).pow(2).sum(), x)
    assert_close(dx, expected, rtol=1e-4, atol=1e-5)
