"""Arguments of every type: what torch takes for a number or a tensor we take, what it refuses we refuse with
its exception, and nothing is updated then. Dtypes of x and parameters in all combinations, against fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from bnfast import exact
from bnfast.functional import batch_norm
from tests.support.buffers import bit_identical
from tests.support.layers import both_modes, every_path

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (FP16, BF16, FP32, FP64)
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
SHAPE = (3, 4, 2, 3)
NAN, INF = float("nan"), float("inf")


def data(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64) + 0.5).to(dtype)


def arguments(**replaced: Any) -> dict[str, Any]:
    names = ("running_mean", "running_var", "weight", "bias")
    given: dict[str, Any] = {name: data(4, seed=n, dtype=FP32) for n, name in enumerate(names, 1)}
    given["running_var"] = given["running_var"].square() + 0.5
    return {"input": data(*SHAPE, dtype=FP32), **given, "training": True, **replaced}


def tensors(given: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def outcome(function: Callable[..., Tensor], given: dict[str, Any]) -> Tensor | type[Exception]:
    try:
        return function(**given)
    except Exception as error:
        return type(error)


def assert_same_outcome(given: dict[str, Any], other: dict[str, Any]) -> type[Exception] | None:
    """given, other: equal arguments, for us and for torch."""
    before = {name: t.clone() for name, t in tensors(given).items()}
    ours, theirs = outcome(batch_norm, given), outcome(F.batch_norm, other)
    if isinstance(theirs, type):
        assert ours is theirs
        for name, t in tensors(given).items():
            assert bit_identical(t, before[name]), name
        return theirs
    assert_close(ours, theirs, **CLOSE)
    assert_close(tensors(given), tensors(other), **CLOSE, equal_nan=True)
    return None


NUMBERS = {
    "momentum 1": {"momentum": 1},
    "momentum 0": {"momentum": 0},
    "momentum True": {"momentum": True},
    "momentum False": {"momentum": False},
    "momentum 0-d": {"momentum": torch.tensor(0.3)},
    "momentum 0-d fp64": {"momentum": torch.tensor(0.3, dtype=FP64)},
    "momentum 0-d integer": {"momentum": torch.tensor(1)},
    "eps 1": {"eps": 1},
    "eps True": {"eps": True},
    "eps 0": {"eps": 0},
    "eps False": {"eps": False},
    "eps 0-d": {"eps": torch.tensor(1e-3)},
    "both 0-d": {"momentum": torch.tensor(0.3), "eps": torch.tensor(1e-3)},
}


@every_path
@both_modes
@pytest.mark.parametrize("options", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_of_any_type(options: dict[str, Any], training: bool, path: str) -> None:
    given, other = (arguments(training=training, **options) for _ in range(2))
    refused = assert_same_outcome(given, other)
    assert refused in (None, ValueError)  # eps of 0 in training


WRONG = {
    "momentum text": {"momentum": "0.1"},
    "momentum a list": {"momentum": [0.1]},
    "momentum complex": {"momentum": 0.1j},
    "momentum a vector": {"momentum": torch.ones(2)},
    "momentum of one element": {"momentum": torch.full((1,), 0.1)},
    "eps text": {"eps": "1e-5"},
    "eps None": {"eps": None},
    "eps a vector": {"eps": torch.ones(2)},
    "training 1": {"training": 1},
    "training 0": {"training": 0},
    "training None": {"training": None},
    "training text": {"training": "yes"},
    "training a tensor": {"training": torch.tensor(True)},
    "weight a list": {"weight": [1.0] * 4},
    "weight a number": {"weight": 1.0},
    "weight 0-d": {"weight": torch.tensor(1.0)},
    "weight of two dimensions": {"weight": torch.ones(4, 1)},
    "bias a list": {"bias": [1.0] * 4},
    "mean a list": {"running_mean": [0.0] * 4},
    "mean a number": {"running_mean": 0.0},
    "variance a list": {"running_var": [1.0] * 4},
    "variance 0-d": {"running_var": torch.tensor(1.0)},
    "integer mean": {"running_mean": torch.zeros(4, dtype=torch.int64)},
    "complex weight": {"weight": torch.ones(4, dtype=torch.complex64)},
    "boolean bias": {"bias": torch.ones(4, dtype=torch.bool)},
    "integer bias": {"bias": torch.ones(4, dtype=torch.int64)},
    "float8 mean": {"running_mean": torch.zeros(4).to(torch.float8_e4m3fn)},
    "x a list": {"input": [[1.0]]},
    "x None": {"input": None},
    "x a number": {"input": 1.0},
    "x 0-d": {"input": torch.tensor(1.0)},
}


@every_path
@both_modes
@pytest.mark.parametrize("replaced", WRONG.values(), ids=WRONG.keys())
def test_wrong_types_as_torch(replaced: dict[str, Any], training: bool, path: str) -> None:
    given, other = (
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
        for given in 2 * [arguments(**{"training": training, **replaced})]
    )
    assert_same_outcome(given, other)


@every_path
@pytest.mark.parametrize(
    "options",
    [{"momentum": 1}, {"momentum": 0}, {"momentum": True}, {"eps": 1}, {"momentum": "0.1"}, {"eps": None}],
    ids=str,
)
def test_layers_with_numbers_of_any_type(options: dict[str, Any], path: str) -> None:
    results = []
    for library in (bnfast, nn):
        module = library.BatchNorm2d(4, **options)
        found = outcome(module, {"input": data(*SHAPE, dtype=FP32)})
        results.append((found, {name: t.clone() for name, t in module.named_buffers()}))
    (ours, buffers), (theirs, others) = results
    if isinstance(theirs, type):
        assert ours is theirs
        assert_close(buffers, dict(bnfast.BatchNorm2d(4).named_buffers()), rtol=0, atol=0)
    else:
        assert_close(ours.detach(), theirs.detach(), **CLOSE)
        assert_close(buffers, others, **CLOSE)


COUNTERS = {
    "[1]": torch.tensor([3]),
    "[1, 1]": torch.tensor([[3]]),
    "[2]": torch.tensor([3, 5]),
    "empty": torch.zeros(0, dtype=torch.int64),
    "int32": torch.tensor(3, dtype=torch.int32),
    "uint8": torch.tensor(3, dtype=torch.uint8),
    "float": torch.tensor(3.0),
    "fp64": torch.tensor(3.0, dtype=FP64),
    "bool": torch.tensor(True),
    "a view": torch.tensor([3, 5])[1],
    "absent": None,
}


@every_path
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("counter", COUNTERS.values(), ids=COUNTERS.keys())
def test_counters_of_any_kind(counter: Tensor | None, momentum: float | None, path: str) -> None:
    """Old checkpoints and helpful utilities leave other things than an int64 scalar there."""
    results = []
    for library in (bnfast, nn):
        module = library.BatchNorm2d(4, momentum=momentum)
        module.num_batches_tracked = None if counter is None else counter.clone()
        before = {name: t.clone() for name, t in module.named_buffers()}
        found = outcome(module, {"input": data(*SHAPE, dtype=FP32)})
        results.append((found, dict(module.named_buffers()), before))
    (ours, buffers, before), (theirs, others, _) = results
    if isinstance(theirs, type):
        assert ours is theirs
        assert_close(buffers, before, rtol=0, atol=0)
    else:
        assert_close(ours.detach(), theirs.detach(), **CLOSE)
        assert_close(buffers, others, **CLOSE)


@every_path
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("old", [1.0, INF, NAN])
@pytest.mark.parametrize("batch", [1.0, INF, NAN])
def test_blending_what_is_not_finite(batch: float, old: float, momentum: float, path: str) -> None:
    """momentum 0 shows a NaN batch, and momentum 1 does not forget infinite statistics: 0 * inf is NaN, in
    torch's formula and so in ours."""
    results = []
    for function in (batch_norm, F.batch_norm):
        x, mean, variance = data(*SHAPE, dtype=FP32), torch.full((4,), old), torch.full((4,), old)
        x[0, 1, 0, 0] *= batch
        y = function(x, mean, variance, training=True, momentum=momentum)
        results.append((mean, variance, y[:, [0, 2, 3]]))
    assert_close(*results, **CLOSE, equal_nan=True)


@both_modes
@pytest.mark.parametrize(("of_x", "of_parameters"), itertools.product(DTYPES, DTYPES), ids=str)
def test_dtypes_of_x_and_parameters(
    of_x: torch.dtype, of_parameters: torch.dtype, training: bool, launches: list[Any]
) -> None:
    """The kernels take each with each, fp64 beside bf16 too: results in their own types, with errors of the
    type that x is computed in. (Plain torch raises for most.)"""
    x, dy = data(*SHAPE, dtype=of_x), data(*SHAPE, seed=5, dtype=of_x)
    weight, bias, mean, variance = (data(4, seed=n, dtype=of_parameters) for n in (1, 2, 3, 4))
    variance = variance.square() + 0.5
    true = exact.batch_norm(x, dy, weight, bias, 1e-5, None if training else (mean, variance))
    expected = {"y": true.y(x), "dx": true.dx(x, dy), "dweight": true.dweight(), "dbias": true.dbias()}
    if training:
        expected |= true.running(mean, variance, 0.1)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    mean, variance = mean.clone(), variance.clone()
    y = batch_norm(leaves[0], mean, variance, *leaves[1:], training=training)
    gradients = torch.autograd.grad(y, leaves, dy)
    found = dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients), strict=True))
    found |= {"running_mean": mean, "running_var": variance}
    assert len(launches) == (4 if training else 2)
    for name, value in expected.items():
        assert found[name].dtype == (of_x if name in ("y", "dx") else of_parameters), name
        assert exact.excess(found[name], value, exact.accumulator(of_x)) <= 1, name


@pytest.mark.parametrize("dtypes", itertools.permutations(DTYPES), ids=str)
def test_every_vector_of_its_own_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    names = ("weight", "bias", "running_mean", "running_var")
    kinds = dict(zip(names, dtypes, strict=True))
    given = {name: data(4, seed=n, dtype=FP16).abs().to(d) for n, (name, d) in enumerate(kinds.items())}
    wide = {name: t.double() for name, t in given.items()}
    x = data(*SHAPE, dtype=FP32)
    y, expected = batch_norm(x, **given, training=True), F.batch_norm(x.double(), **wide, training=True)
    assert_close(y, expected.float(), **CLOSE)
    for name in names[2:]:
        assert_close(given[name], wide[name].to(given[name].dtype), rtol=1e-2, atol=1e-2)
