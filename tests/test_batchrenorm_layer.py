"""BatchRenorm as a layer: its state, what it refuses, and what compilers and converters make of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bnfast
from bnfast.functional import batch_renorm
from tests.support.buffers import bit_identical
from tests.support.layers import data, every_path
from tests.support.versions import TORCH

X = data(4, 3, 2, 2)


def assert_untouched(module: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        assert bit_identical(value, state[name]), name


@every_path
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "compiled inside", "compiled around"])
def test_recomputation_is_refused(how: str, path: str) -> None:
    """In compiled code what the call is part of shows only when it runs. (PyTorch 2.11's compiler keeps what
    the kernels have made in such a part, and computes nothing again.)"""
    torch._dynamo.reset()
    module = bnfast.BatchRenorm2d(3, warmup_steps=0, r_max_steps=1, d_max_steps=1)
    twin, x = copy.deepcopy(module), X.clone().requires_grad_()
    if how == "compiled around":
        call = torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), backend="aot_eager")
        y = call(x)
    else:
        call = torch.compile(module, backend="aot_eager") if how == "compiled inside" else module
        y = checkpoint(call, x, use_reentrant=how == "reentrant")
    state = copy.deepcopy(module.state_dict())
    if TORCH == (2, 11) and path == "kernels" and how == "compiled around":
        found, expected = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, twin(x)))
        assert bit_identical(found, expected)
    else:
        with pytest.raises(RuntimeError, match="within a backward"):
            y.square().sum().backward()
    assert_untouched(module, state)


def test_state_loads_both_ways() -> None:
    batch_norm, renorm = nn.BatchNorm2d(3), bnfast.BatchRenorm2d(3)
    batch_norm(X * 3 + 1)
    assert batch_norm.state_dict().keys() == renorm.state_dict().keys()
    renorm.load_state_dict(batch_norm.state_dict(), strict=True)
    assert_close(renorm.eval()(X), batch_norm.eval()(X))
    batch_norm.load_state_dict(renorm.state_dict(), strict=True)


VECTORS = ("running_mean", "running_var", "weight", "bias")
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r_max": 0.9}, ValueError, "r_max must be at least 1"),
    ({"r_max": 0.1, "training": False}, ValueError, "r_max must be at least 1"),
    ({"d_max": float("nan")}, ValueError, "d_max"),
    ({"eps": 0.0}, ValueError, "eps"),
    ({"momentum": None}, TypeError, "momentum"),
    ({"training": "yes"}, TypeError, "training"),
    ({"running_mean": None, "running_var": None}, ValueError, "running_mean"),
    ({"input": X[:1, :, :1, :1]}, ValueError, "more than 1 value"),
    *(
        ({name: torch.ones(size)}, RuntimeError, rf"{name} should be of shape \[3\], but got \[{size}\]")
        for name in VECTORS
        for size in (1, 2, 4)
    ),
]


@every_path
@pytest.mark.parametrize(("replaced", "error", "words"), REFUSED, ids=[f"{r} {w}" for r, _, w in REFUSED])
def test_calls_it_refuses(replaced: dict[str, Any], error: type[Exception], words: str, path: str) -> None:
    vectors = {name: data(3, seed=n).abs() for n, name in enumerate(VECTORS)}
    given: dict[str, Any] = {"input": X, **vectors, "training": True, **replaced}
    before = copy.deepcopy(given)
    with pytest.raises(error, match=words):
        batch_renorm(**given)
    assert all(bit_identical(given[name], t) for name, t in before.items() if isinstance(t, Tensor))


@every_path
def test_limits_may_be_tensors(path: str) -> None:
    found, expected = (
        batch_renorm(X, torch.zeros(3), torch.ones(3), training=True, r_max=r_max, d_max=d_max)
        for r_max, d_max in ((torch.tensor(2.0), torch.tensor(1)), (2.0, 1.0))
    )
    assert_close(found, expected)


def test_gradients_of_the_formulas() -> None:
    """create_graph=True runs the formulas in the kernels' place."""
    sizes = ((4, 3, 2, 2), (3,), (3,))
    leaves = [data(*size, seed=n, dtype=torch.float64).requires_grad_() for n, size in enumerate(sizes)]
    x, weight, bias = leaves
    y = batch_renorm(x, torch.zeros(3), torch.ones(3) / 2, weight, bias, training=True, activation="silu")
    graph, plain = (torch.autograd.grad(y, leaves, x.cos(), create_graph=create) for create in (True, False))
    assert_close(graph, plain)


@every_path
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64, torch.float8_e5m2], ids=str)
def test_input_that_is_no_batch_of_numbers(path: str, dtype: torch.dtype) -> None:
    module = bnfast.BatchRenorm2d(3)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TypeError, match=str(dtype)):
        module(X.to(dtype))
    assert_untouched(module, before)


@every_path
def test_statistics_that_cannot_be_written_to(path: str) -> None:
    with torch.inference_mode():
        module = bnfast.BatchRenorm2d(3)
    with pytest.raises(RuntimeError, match="inference tensor"):
        module(X)
    assert not module.running_mean.any()
    module = bnfast.BatchRenorm2d(3)
    module.running_mean = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="running_mean should be of floating point"):
        module(X)


def test_quantization_sees_a_plain_module() -> None:
    module = bnfast.BatchRenorm2d(3).eval()
    assert not hasattr(module, "qconfig")
    module.qconfig = "some"
    assert copy.deepcopy(module).qconfig == "some"
    del module.qconfig
    assert not hasattr(module, "qconfig")


def test_converters_and_scripting_say_what_to_do() -> None:
    model = nn.Sequential(bnfast.BatchRenorm2d(3))
    with pytest.raises(RuntimeError, match="renormalizes"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(RuntimeError, match="torch.export"):
        torch.jit.script(model)
    assert "r_max=3.0" in repr(model)
    assert isinstance(model[0], nn.modules.batchnorm._BatchNorm)
    assert not isinstance(model[0], nn.BatchNorm2d)
    assert copy.deepcopy(model)[0].r_max == 3.0
