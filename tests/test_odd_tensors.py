"""Tensors that are not what they seem: of inference mode, lazily
negated or zero, subclasses. On the kernels and on plain torch, all as torch's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import bnfast
from bnfast.functional import batch_norm
from tests.support.buffers import bit_identical
from tests.support.layers import both_modes, data, every_path

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
SHAPE = (3, 4, 2, 3)


def vectors() -> dict[str, Tensor]:
    given = {
        name: data(4, seed=n) for n, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1)
    }
    given["running_var"] = given["running_var"].square() + 0.5
    return given


def copies(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics of one's own, to write to."""
    return {name: v.clone() if name.startswith("running") else v for name, v in given.items()}


def outcome(call: Callable[[], dict[str, Any]]) -> dict[str, Any] | type[Exception]:
    try:
        return call()
    except Exception as error:
        return type(error)


MEMBERS = {
    "statistics": ("running_mean", "running_var"),
    "parameters": ("weight", "bias"),
    "all": ("x", "weight", "bias", "running_mean", "running_var"),
}
INFERENCE = [
    (inference, wanted)
    for inference in ("x", "weight", "bias", "running_mean", "running_var", *MEMBERS)
    for wanted in ("x", "weight", "bias", "nothing")
    if wanted not in MEMBERS.get(inference, (inference,))  # an inference tensor wants no gradient
]


@every_path
@both_modes
@pytest.mark.parametrize(("inference", "wanted"), INFERENCE)
def test_inference_tensors_outside_inference_mode(
    inference: str, wanted: str, training: bool, path: str
) -> None:
    """torch refuses to save them for a backward, ours to do so where theirs does, and to update nothing then.
    In eval no statistics are saved here, so none are in the way of a gradient."""
    of_inference = MEMBERS.get(inference, (inference,))

    def run(function: Callable[..., Tensor], given: dict[str, Tensor]) -> dict[str, Any]:
        given = dict(given)
        x = given.pop("x")
        y = function(x, **given, training=training)
        gradients = {}
        if wanted != "nothing":
            leaf = x if wanted == "x" else given[wanted]
            gradients = {"gradient": torch.autograd.grad(y, leaf, data(*SHAPE, seed=5))[0]}
        state = {k: given[k].clone() for k in ("running_mean", "running_var")}
        return {"y": y.detach(), "requires_grad": y.requires_grad, **gradients, **state}

    results, held = [], []
    for function in (batch_norm, F.batch_norm):
        given = {"x": data(*SHAPE), **vectors()}
        free = () if training or function is batch_norm else MEMBERS["statistics"]
        for name in set(of_inference).difference(free):
            with torch.inference_mode():
                given[name] = given[name].clone()
        if wanted != "nothing":
            given[wanted].requires_grad_()
        held.append(given)
        results.append(outcome(lambda f=function, g=given: run(f, g)))
    ours, theirs = results
    if isinstance(theirs, type):
        assert ours is theirs
        for name, value in vectors().items():
            assert bit_identical(held[0][name].clone(), value), name
    else:
        assert_close(ours, theirs, **CLOSE)


@every_path
@both_modes
@pytest.mark.parametrize("within", [True, False], ids=["within", "outside"])
@pytest.mark.parametrize("made_in", [True, False], ids=["made in inference mode", "made outside"])
def test_layers_and_inference_mode(made_in: bool, within: bool, training: bool, path: str) -> None:
    def run(library: Any) -> tuple[Any, nn.Module]:
        with torch.inference_mode() if made_in else contextlib.nullcontext():
            module = library.BatchNorm2d(4).train(training)
        with torch.inference_mode() if within else contextlib.nullcontext():
            found = outcome(lambda: {"y": module(data(*SHAPE)).clone()})
        return found, module

    (ours, module), (theirs, other) = run(bnfast), run(nn)
    if isinstance(theirs, type):
        assert ours is theirs
        assert module.num_batches_tracked == 0
        assert not module.running_mean.any()
    else:
        assert_close(ours, theirs, **CLOSE)
        assert_close(dict(module.named_buffers()), dict(other.named_buffers()))


@every_path
@both_modes
@pytest.mark.parametrize("lazy", ["x", "dy", "both"])
def test_negated_by_a_bit(lazy: str, training: bool, path: str) -> None:
    """The imaginary part of a conjugate holds the negative of its memory."""
    results = []
    for function in (batch_norm, F.batch_norm):
        x, dy, given = data(*SHAPE), data(*SHAPE, seed=5), vectors()
        if lazy != "dy":
            x = torch._neg_view(x)
            assert x.is_neg()
        if lazy != "x":
            dy = torch._neg_view(dy)
        x = x.detach().requires_grad_()
        y = function(x, **given, training=training)
        (dx,) = torch.autograd.grad(y, x, dy)
        results.append({"y": y.detach(), "dx": dx, **given})
    assert_close(*results, **CLOSE)


@every_path
@both_modes
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradient_that_is_zero_without_memory(layout: torch.memory_format, training: bool, path: str) -> None:
    """What autograd makes up for an output that nobody used."""
    x, given = data(*SHAPE).contiguous(memory_format=layout).requires_grad_(), vectors()
    leaves = [x, given["weight"].requires_grad_(), given["bias"].requires_grad_()]
    y = batch_norm(x, **given, training=training)
    dy = torch._efficientzerotensor(SHAPE)
    assert dy._is_zerotensor()
    gradients = torch.autograd.grad(y, leaves, dy)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


class Tagged(Tensor):
    """The simplest subclass: torch's functions return it when they are given it."""


class Nothing(TorchDispatchMode):
    """Watches operators go by."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def tagged(t: Tensor) -> Tensor:
    return t.as_subclass(Tagged)


def doubled(t: Tensor) -> Tensor:
    return TwoTensor(t, t.clone())


def plain(value: Any) -> Any:
    return value.a if isinstance(value, TwoTensor) else torch.Tensor.as_subclass(value, Tensor)


@every_path
@both_modes
@pytest.mark.parametrize("watched", [False, True], ids=["", "under a mode"])
@pytest.mark.parametrize("held", ["weight", "statistics", "all"])
@pytest.mark.parametrize("wrap", [tagged, doubled])
def test_subclasses_in_a_layer(
    wrap: Callable[[Tensor], Tensor], held: str, watched: bool, training: bool, path: str
) -> None:
    """Quantized and sharded parameters are subclasses, beside an input that is none: theirs is the say."""
    results = []
    for library in (bnfast, nn):
        module, given = library.BatchNorm2d(4).train(training), vectors()
        for name, value in given.items():
            value = wrap(value) if held == "all" or name in MEMBERS.get(held, (held,)) else value
            if name.startswith("running"):
                module._buffers[name] = value
            else:
                module._parameters[name] = value.requires_grad_()
        x = data(*SHAPE).requires_grad_()
        with Nothing() if watched else contextlib.nullcontext():
            y = module(x)
            leaves = [x, module.weight, module.bias]
            gradients = torch.autograd.grad(y.sum() if wrap is tagged else (y * y).sum(), leaves)
        named = dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients), strict=True))
        named |= dict(module.named_buffers())
        results.append({name: (type(value), plain(value.detach())) for name, value in named.items()})
    ours, theirs = results
    for name, (kind, value) in theirs.items():
        assert ours[name][0] is kind, name
        assert_close(ours[name][1], value, **CLOSE)


@every_path
@both_modes
def test_functions_overridden_by_a_parameter(training: bool, path: str) -> None:
    """__torch_function__ of any argument sees the call of our function, as it would of torch's."""
    seen = []

    class Listening(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    given = vectors()
    expected = F.batch_norm(data(*SHAPE), **copies(given), training=training)
    given["weight"] = given["weight"].as_subclass(Listening)
    y = batch_norm(data(*SHAPE), **copies(given), training=training)
    assert seen[0] is batch_norm
    assert type(y) is Listening
    assert_close(y.as_subclass(Tensor), expected, **CLOSE)
