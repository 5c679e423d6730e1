"""Tensors that are not what they seem: tensors of inference mode, and those whose memory does not hold their
values. On the kernels and in plain torch, all is as torch's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from bnfast.functional import batch_norm
from tests.support.buffers import bit_identical
from tests.support.layers import both_modes, data, every_path

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
SHAPE = (3, 4, 2, 3)
MEMBERS = {
    "statistics": ("running_mean", "running_var"),
    "parameters": ("weight", "bias"),
    "all": ("x", "weight", "bias", "running_mean", "running_var"),
}
INFERENCE = [
    (inference, wanted)
    for inference in (*MEMBERS["all"], *MEMBERS)
    for wanted in ("x", "weight", "bias", "nothing")
    if wanted not in MEMBERS.get(inference, (inference,))  # an inference tensor wants no gradient
]


def arguments() -> dict[str, Tensor]:
    given = {name: data(4, seed=n) for n, name in enumerate(MEMBERS["all"])}
    return {**given, "x": data(*SHAPE), "running_var": given["running_var"].square() + 0.5}


def attempt(call: Callable[[], Any]) -> Any:
    """What it returns, or the type of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error)


@every_path
@both_modes
@pytest.mark.parametrize(("inference", "wanted"), INFERENCE)
def test_inference_tensors_outside_inference_mode(
    inference: str, wanted: str, training: bool, path: str
) -> None:
    """Where torch refuses to save them for a backward, ours refuses it too, and updates nothing. In eval ours
    saves no statistics, so these do not forbid a gradient, as they do in torch."""

    def run(function: Callable[..., Tensor], given: dict[str, Tensor]) -> dict[str, Any]:
        y = function(given["x"], **{k: v for k, v in given.items() if k != "x"}, training=training)
        dy = data(*SHAPE, seed=5)
        gradients = torch.autograd.grad(y, given[wanted], dy) if wanted in given else ()
        state = [given[name].clone() for name in MEMBERS["statistics"]]
        return {"y": y.detach(), "gradients": gradients, "attached": y.requires_grad, "state": state}

    results = []
    for function in (F.batch_norm, batch_norm):
        given = arguments()
        for name in MEMBERS.get(inference, (inference,)):
            if training or function is batch_norm or name not in MEMBERS["statistics"]:
                with torch.inference_mode():
                    given[name] = given[name].clone()
        if wanted in given:
            given[wanted].requires_grad_()
        results.append(attempt(lambda f=function, g=given: run(f, g)))
    theirs, ours = results
    if isinstance(theirs, type):
        assert ours is theirs
        assert all(bit_identical(given[name].clone(), value) for name, value in arguments().items())
    else:
        assert_close(ours, theirs, **CLOSE)


@every_path
@both_modes
@pytest.mark.parametrize("within", [True, False], ids=["within", "outside"])
@pytest.mark.parametrize("made_in", [True, False], ids=["made in inference mode", "made outside"])
def test_layers_and_inference_mode(made_in: bool, within: bool, training: bool, path: str) -> None:
    results, states = [], []
    for library in (bnfast, nn):
        with torch.inference_mode(made_in):
            module = library.BatchNorm2d(4).train(training)
        with torch.inference_mode() if within else contextlib.nullcontext():
            results.append(attempt(lambda m=module: m(data(*SHAPE)).clone()))
        states.append(dict(module.named_buffers()))
    if isinstance(results[1], type):
        assert results[0] is results[1]
        states[1] = dict(nn.BatchNorm2d(4).named_buffers())
    else:
        assert_close(*results, **CLOSE)
    assert_close(*states)


def zero(t: Tensor) -> Tensor:
    return torch._efficientzerotensor(t.shape)


negated = torch._neg_view
LAZY = {
    "x negated": (negated, Tensor.contiguous),
    "dy negated": (Tensor.contiguous, negated),
    "both negated": (negated, negated),
    "dy zero": (Tensor.contiguous, zero),
    "dy zero, channels_last": (lambda t: t.contiguous(memory_format=torch.channels_last), zero),
}


@every_path
@both_modes
@pytest.mark.parametrize(("x_as", "dy_as"), LAZY.values(), ids=LAZY.keys())
def test_values_that_memory_does_not_hold(x_as: Any, dy_as: Any, training: bool, path: str) -> None:
    """The imaginary part of a conjugate holds the negative of its memory. A zero without memory is what
    autograd makes up for an output that nobody used."""
    results, dy = [], dy_as(data(*SHAPE, seed=5))
    for function in (batch_norm, F.batch_norm):
        given = arguments()
        given["x"] = x_as(given["x"])
        leaves = [given[name].requires_grad_() for name in ("x", "weight", "bias")]
        y = function(given.pop("x"), **given, training=training)
        gradients = torch.autograd.grad(y, leaves, dy)
        results.append([y.detach(), gradients, given])
        dy = torch.zeros(SHAPE) if dy_as is zero else dy
    assert_close(*results, **CLOSE)
