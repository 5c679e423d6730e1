"""Derivatives beyond a step: of the fourth order, in forward mode, in mixed precision, with a penalty on
gradients, in anomaly mode, with checkpointing. Where torch.nn's layer raises, ours raises the same."""

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
from tests.support.layers import BY_NAME, both_modes, data, every_path

FP64 = torch.float64
LAYER = BY_NAME["BatchNorm1d"]


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return data(*shape, seed=seed, dtype=FP64)


def by_hand(x: Tensor, mean: Tensor, variance: Tensor, training: bool) -> Tensor:
    if training:
        mean = x.mean(0)
        variance = (x - mean).square().mean(0)
    return (x - mean) / (variance + 1e-5).sqrt()


@both_modes
def test_fourth_derivative(training: bool) -> None:
    """Judged by elementary operations. torch's own batch_norm cannot judge: in training, its third derivative
    leaves out how the batch statistics depend on x."""

    def fourth(function: Callable[..., Tensor]) -> Tensor:
        x = doubles(3, 2).requires_grad_()
        statistics = doubles(2, seed=5), doubles(2, seed=6).square() + 0.5
        result = function(x, *statistics, training=training).pow(5).sum()
        for seed in (1, 2, 3, 4):
            (slope,) = torch.autograd.grad(result, x, create_graph=True)
            result = (slope * doubles(3, 2, seed=seed)).sum()
        return result

    expected = fourth(by_hand)
    assert expected.abs() > 1e-3
    assert_close(fourth(batch_norm), expected)


@pytest.mark.parametrize("dual", ["x", "weight", "running_mean", "dy"])
@both_modes
def test_forward_mode(training: bool, dual: str) -> None:
    """Tangents through the input, a parameter, the statistics, and the backward."""

    def tangent(function: Callable[..., Tensor]) -> Any:
        given = {"running_mean": doubles(2, seed=1), "running_var": doubles(2, seed=2).abs() + 0.1}
        given |= {"weight": doubles(2, seed=3), "x": doubles(4, 2)}
        direction = doubles(*given.get(dual, given["x"]).shape, seed=5)
        if dual == "dy":
            x = given.pop("x").requires_grad_()
            y = function(x, **given, training=training)
            with forward_ad.dual_level():
                dy = forward_ad.make_dual(doubles(4, 2, seed=4), direction)
                return forward_ad.unpack_dual(torch.autograd.grad(y, x, dy)[0])
        with forward_ad.dual_level():
            given[dual] = forward_ad.make_dual(given[dual], direction)
            return forward_ad.unpack_dual(function(given.pop("x"), **given, training=training))

    try:
        expected = tangent(F.batch_norm)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error).split(".")[0][:40]):
            tangent(batch_norm)
        return
    assert_close(tuple(tangent(batch_norm)), tuple(expected))


@both_modes
def test_double_backward_in_mixed_precision(training: bool) -> None:
    """bf16 activations, fp32 parameters: second-order gradients of their types, with fp64's values."""

    def second(dtype: torch.dtype, wide: torch.dtype, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, dy, direction = (doubles(6, 2, 3, seed=n).bfloat16().to(dtype) for n in (0, 5, 6))
        weight, bias, mean, variance = (
            doubles(2, seed=n).abs().float().to(wide) + 0.25 for n in (1, 2, 3, 4)
        )
        leaves = [t.requires_grad_() for t in (x, weight, dy)]
        y = function(x, mean, variance, weight, bias.requires_grad_(), training=training)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        return torch.autograd.grad((dx * direction).sum() + dweight.square().sum(), leaves)

    ours, exact = second(torch.bfloat16, torch.float32, batch_norm), second(FP64, FP64, F.batch_norm)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for mine, true in zip(ours, exact, strict=True):
        assert (mine.double() - true).norm() <= 2e-2 * true.norm()


def test_anomaly_mode() -> None:
    """A sound backward passes; one that returns NaN is named, with the line of its forward."""
    module, x = bnfast.BatchNorm1d(2), data(4, 2).requires_grad_()
    told = r"(?s)Error detected in BatchNormBackward.*Traceback of forward call.*y = module"
    with torch.autograd.set_detect_anomaly(True):
        module(x).square().sum().backward()
        y = module(x)
        with (
            pytest.warns(UserWarning, match=told),
            pytest.raises(RuntimeError, match="BatchNormBackward.* returned nan"),
        ):
            y.backward(torch.full_like(y, float("nan")))


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "checkpoint, reentrant": lambda module, x: checkpoint(module, x, use_reentrant=True),
    "checkpoint": lambda module, x: checkpoint(module, x, use_reentrant=False),
    "simply": lambda module, x: module(x),
    "penalty": lambda module, x: module(x),
}


@every_path
@pytest.mark.parametrize("how", CALLS)
def test_two_batches_then_their_backwards(how: str, path: str) -> None:
    """A discriminator sees a real and a generated batch. A checkpoint runs the forward again: torch.nn counts
    such a batch twice, and so do we. The penalty is WGAN-GP's: the loss holds the norm of a gradient, and
    with an opaque backward it would be silently wrong."""
    results = []
    for module in LAYER.pair(momentum=None, dtype=FP64):
        batches = [LAYER.input(seed, FP64).requires_grad_() for seed in (1, 2)]
        loss = sum(CALLS[how](module, x).pow(3).sum() for x in batches)
        if how == "penalty":
            slopes = torch.autograd.grad(loss, batches, create_graph=True)
            loss = loss + sum((slope.norm(dim=1) - 1).square().sum() for slope in slopes)
        loss.backward()
        gradients = [x.grad for x in batches] + [p.grad for p in module.parameters()]
        results.append([gradients, module.state_dict()])
    assert results[1][1]["num_batches_tracked"] == (4 if "checkpoint" in how else 2)
    assert_close(*results)


@every_path
def test_code_that_saved_a_buffer_is_told(path: str) -> None:
    """A step changes the buffer in place, while a gradient needs its old value."""
    layer = bnfast.BatchNorm2d(3)
    y = layer.running_mean * torch.ones(3, requires_grad=True)
    layer(data(4, 3, 5, 5).requires_grad_())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_path
def test_a_shape_that_changes_before_the_backward(path: str, launches: list[Any]) -> None:
    """A list belongs to the caller, who may change it; the kernels take it all the same."""
    x, shape = data(4, 3, 6).requires_grad_(), [6]
    y = layer_norm(x, shape)
    assert bool(launches) == (path == "kernels")
    shape.insert(0, 3)
    expected = F.layer_norm(x, [6])
    assert_close(*(torch.autograd.grad(t.square().sum(), x) for t in (y, expected)), rtol=1e-4, atol=1e-5)
