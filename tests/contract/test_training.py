"""Every layer trains and evaluates as its twin does: torch.nn's layer, or the formulas where there is none.
Outputs, gradients, state, and how they lie in memory."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_db

from bnfast import exact, functional
from tests.support import layers
from tests.support.layers import (
    BY_NAME,
    CLOSE,
    DTYPES,
    KINDS,
    LAYERS,
    TRACKING,
    Layer,
    Options,
    assert_same,
    attempt,
    data,
    step,
)


def cases() -> Iterator[tuple[Layer, Options]]:
    """Every layer with its options; torch's own samples of its layers; one sample alone; and what is empty:
    the last batch of a filtered data set, planes, and rows."""
    yield from ((layer, options) for layer in LAYERS for options in layer.options)
    for info in module_db:
        name = info.module_cls.__name__
        if name in BY_NAME and hasattr(nn, name):
            given: Any = {"device": "cpu", "dtype": torch.float32, "requires_grad": True}
            for sample in info.module_inputs_func(info, training=True, **given):
                made, (x,) = sample.constructor_input, sample.forward_input.args
                yield replace(BY_NAME[name], arguments=made.args, shape=tuple(x.shape)), made.kwargs
    for layer in LAYERS:
        if layer.name.startswith("InstanceNorm"):
            yield from ((replace(layer, shape=layer.shape[1:]), options) for options in ({}, TRACKING))
    yield from ((replace(layer, shape=(0, *layer.shape[1:])), {}) for layer in KINDS)
    for options in ({}, {"affine": False}, {"momentum": None}):
        yield replace(BY_NAME["BatchNorm2d"], shape=(2, 4, 0, 3)), options
    for shape in ((0, 4), (3, 0), (2, 0, 4)):
        yield replace(BY_NAME["LayerNorm"], arguments=(shape[-1],), shape=shape), {}


CASES = [
    pytest.param(layer, options, last, id=f"{layer}{layer.arguments}-{layer.shape}-{options}-{last}")
    for layer, options in cases()
    for last in (
        (False, True) if layer in LAYERS and layer.keeps_format and len(layer.shape) > 3 else (False,)
    )
]


@layers.every_path
@pytest.mark.parametrize(("layer", "options", "last"), CASES)
def test_trains_and_evaluates_like_its_twin(
    layer: Layer, options: Options, last: bool, path: str, launches: list[Any]
) -> None:
    """Two steps of training and one of evaluation. An empty batch is counted, and changes no statistics."""
    ours, theirs = layer.pair(**options)
    if layer.drop_in:  # weight-decay filters, freezers and update_bn look for the classes
        assert isinstance(ours, type(theirs))
        assert type(ours).__name__ == type(theirs).__name__
        assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for seed in range(3):
        if seed == 2:
            ours.eval(), theirs.eval()
        x = layer.input(seed, options.get("dtype", torch.float32), last)
        found = step(ours, x)
        # torch's samples are larger, and dx is a difference of larger numbers
        close = (
            {} if layer in LAYERS else {"rtol": 1e-5, "atol": 3e-5} if x.numel() else {"rtol": 0, "atol": 0}
        )
        assert_same(found, step(theirs, x), **close)
        if layer.keeps_format:
            assert found["y"].stride() == found["dx"].stride() == x.stride()
    assert bool(launches) == (path == "kernels" and x.numel() > 0)
    assert all(buffer.grad is None for buffer in ours.buffers())


@layers.every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("layer", [layer for layer in KINDS if layer.name != "FrozenBatchNorm2d"], ids=str)
def test_half_input_keeps_its_dtype(layer: Layer, dtype: torch.dtype, autocast: bool, path: str) -> None:
    """Beside fp32 parameters and statistics, which stay so and have gradients of their own dtype."""
    ours, theirs = layer.pair(**(layer.tracks or {}))
    x = layer.input().to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = step(ours, x)
    expected = step(theirs, x.float())
    for name, t in found.items():
        assert t.dtype == (dtype if name in ("y", "dx") else expected[name].dtype), name
    assert_same(found, expected, rtol=2e-2, atol=5e-2, check_dtype=False)
    for name in set(found) & {"running_mean", "running_var"}:
        coarse = {} if path == "kernels" or layer.name.startswith("Batch") else {"rtol": 1e-2, "atol": 1e-2}
        assert_close(found[name], expected[name], **(coarse or CLOSE))


@layers.drop_ins
def test_half_layers_take_float_input(layer: Layer, launches: list[Any]) -> None:
    """The kernels compute in fp32 whatever the parameters and statistics are; .half() makes these fp16."""
    ours, theirs = layer.pair(**(layer.tracks or {}))
    found, expected = step(ours.half(), layer.input()), step(theirs, layer.input())
    assert launches
    for name, t in found.items():
        half = name.startswith(("weight", "bias", "running", "dweight", "dbias"))
        assert not t.is_floating_point() or t.dtype == (torch.float16 if half else torch.float32), name
    assert_same(found, expected, rtol=2e-3, atol=2e-3, check_dtype=False)


@pytest.mark.parametrize("norm", ["group", "instance", "layer"])
def test_plain_torch_takes_parameters_of_the_other_half(norm: str, plain_torch: None) -> None:
    """Which torch's own functions refuse."""
    dtypes = (torch.bfloat16, torch.float16, torch.float16)
    given = [data(*size, dtype=dtype) for size, dtype in zip(((2, 4, 3, 4), (4,), (4,)), dtypes, strict=True)]
    ours, theirs = layers.norms(norm)
    assert_close(ours(*given), theirs(*(t.float() for t in given)).bfloat16())


VECTORS = ("weight", "bias", "running_mean", "running_var")
ALIKE = [(of_x, [of_vectors] * 4) for of_x, of_vectors in itertools.product(DTYPES, DTYPES)]
EACH_ITS_OWN = [(torch.float32, dtypes) for dtypes in itertools.permutations(DTYPES)]


@layers.both_modes
@pytest.mark.parametrize(("of_x", "of_vectors"), [*ALIKE, *EACH_ITS_OWN], ids=str)
def test_dtypes_of_x_and_vectors(
    of_x: torch.dtype, of_vectors: Any, training: bool, launches: list[Any]
) -> None:
    """The kernels take each with each, fp64 beside bf16 too: results in their own types, with errors of the
    type that x is computed in. (Plain torch raises for most.)"""
    x, dy = (data(3, 4, 2, 3, seed=seed, dtype=of_x) for seed in (0, 5))
    kinds = {"y": of_x, "dx": of_x, **dict(zip(VECTORS, of_vectors, strict=True))}
    given = {name: data(4, seed=n, dtype=kinds[name]).abs() for n, name in enumerate(VECTORS, 1)}
    weight, bias, mean, variance = given.values()
    true = exact.batch_norm(x, dy, weight, bias, 1e-5, None if training else (mean, variance))
    expected = {"y": true.y(x), "dx": true.dx(x, dy), "dweight": true.dweight(), "dbias": true.dbias()}
    if training:
        expected |= true.running(mean, variance, 0.1)
    found = layers.derivatives(
        lambda x, weight, bias: functional.batch_norm(x, mean, variance, weight, bias, training),
        x, [weight, bias], dy,
    )  # fmt: skip
    found |= {"running_mean": mean, "running_var": variance}
    assert len(launches) == 2
    for name, value in expected.items():
        assert found[name].dtype == kinds[name if name in kinds else name[1:]], name
        assert exact.error_ratio(found[name], value, exact.accumulator(of_x)) <= 1, name


NO_GRAD, INFERENCE, NOWHERE = torch.no_grad, torch.inference_mode, contextlib.nullcontext


@layers.every_path
@layers.both_modes
@pytest.mark.parametrize(
    ("made", "used"), [(NOWHERE, NO_GRAD), (NOWHERE, INFERENCE), (INFERENCE, INFERENCE), (INFERENCE, NOWHERE)]
)
@layers.every_layer
def test_grad_mode_off(layer: Layer, made: Any, used: Any, training: bool, path: str) -> None:
    """Buffers made in inference mode cannot be updated outside: a batch that raises is not counted."""
    x, results = layer.input().requires_grad_(used is not NOWHERE), []
    with made():
        pair = layer.pair(**(layer.tracks or {}))
    before = copy.deepcopy(pair[0].state_dict())
    for module in pair:
        with used():
            y = attempt(lambda module=module: module.train(training)(x))
        state = {name: t.clone() for name, t in module.state_dict().items()}
        results.append((y, state) if isinstance(y, type) else (y.clone(), state, y.is_inference()))
        assert isinstance(y, type) or not y.requires_grad
    (found, state, *_), (expected, *_) = results
    if isinstance(expected, type):
        assert found is expected
        assert "Instance" in layer.name or all(torch.equal(state[name], t) for name, t in before.items())
    else:
        assert_close(*results, **CLOSE)


@layers.every_path
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("old", [1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("batch", [1.0, torch.inf, torch.nan])
def test_running_statistics_that_are_not_finite(batch: float, old: float, momentum: float, path: str) -> None:
    """momentum 0 shows a NaN batch, and momentum 1 does not forget infinite statistics: 0 * inf is NaN, in
    torch's formula and so in ours."""
    results = []
    for library in (functional, F):
        x, mean, variance = data(3, 4, 2, 3), torch.full((4,), old), torch.full((4,), old)
        x[0, 1, 0, 0] *= batch
        y = library.batch_norm(x, mean, variance, training=True, momentum=momentum)
        results.append((mean, variance, y[:, [0, 2, 3]]))
    assert_close(*results, **CLOSE, equal_nan=True)


@layers.every_path
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instance_norms_running_statistics(dtype: torch.dtype, kind: torch.dtype, path: str) -> None:
    """The samples' average of mean and unbiased variance, also where the variance is far below eps."""
    x = (data(3, 4, 6, 6) * 1e-4).to(dtype)
    mean, variance = torch.full((4,), 0.25, dtype=kind), torch.full((4,), 1e-8, dtype=kind)
    functional.instance_norm(x, mean, variance, momentum=0.75)
    wide = x.double()
    # in plain torch, its own rounding
    coarse = kind == torch.float16 or (path == "torch" and dtype != torch.float32)
    close = {"rtol": 2e-3, "atol": 6e-8} if coarse else {"rtol": 1e-5, "atol": 0.0}
    assert_close(mean.double(), 0.0625 + 0.75 * wide.mean((2, 3)).mean(0), **close)
    if not coarse:  # of which 1e-8 is no number in fp16
        assert_close(variance.double(), 0.25e-8 + 0.75 * wide.var((2, 3)).mean(0), rtol=1e-4, atol=0)
