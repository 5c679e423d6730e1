"""BatchRenorm as a layer: its state, what it refuses, and what compilers and converters make of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnfast
from bnfast.functional import batch_renorm
from tests.support.buffers import bit_identical
from tests.support.layers import every_path
from tests.support.versions import TORCH


@every_path
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_refused(reentrant: bool, path: str) -> None:
    module = bnfast.BatchRenorm2d(3)
    y = checkpoint(module, torch.randn(4, 3, 2, 2, requires_grad=True), use_reentrant=reentrant)
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="within a backward"):
        y.sum().backward()
    for name, value in module.state_dict().items():
        assert bit_identical(value, state[name]), name


def test_state_loads_both_ways() -> None:
    batch_norm, renorm = nn.BatchNorm2d(3), bnfast.BatchRenorm2d(3)
    batch_norm(torch.randn(4, 3, 2, 2) * 3 + 1)
    assert batch_norm.state_dict().keys() == renorm.state_dict().keys()
    renorm.load_state_dict(batch_norm.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(renorm.eval()(x), batch_norm.eval()(x))
    batch_norm.load_state_dict(renorm.state_dict(), strict=True)


def test_bad_arguments() -> None:
    for options, message in (
        ({"momentum": None}, "momentum"),
        ({"track_running_stats": False}, "track_running_stats"),
        ({"r_max": 0.5}, "r_max"),
        ({"d_max": -1.0}, "d_max"),
        ({"warmup_steps": 10, "r_max_steps": 5}, "warmup_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            bnfast.BatchRenorm2d(3, **options)
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    for options, error_type in (
        ({"r_max": 0.9}, ValueError),
        ({"d_max": float("nan")}, ValueError),
        ({"momentum": None}, TypeError),
        ({"eps": 0.0}, ValueError),
    ):
        with pytest.raises(error_type):
            batch_renorm(x, mean, var, training=True, **options)
    with pytest.raises(ValueError, match="running_mean"):
        batch_renorm(x, None, None, training=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_renorm(x[:1], mean, var, training=True)
    assert not mean.any()
    assert (var == 1).all()


@every_path
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64, torch.float8_e5m2], ids=str)
def test_input_that_is_no_batch_of_numbers(path: str, dtype: torch.dtype) -> None:
    module = bnfast.BatchRenorm2d(3)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TypeError, match=str(dtype)):
        module(torch.ones(4, 3, 2, 2).to(dtype))
    assert all(bit_identical(t, before[name]) for name, t in module.state_dict().items())


@every_path
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_vectors_of_another_size(path: str, name: str, size: int) -> None:
    x, good = torch.randn(4, 3, 2, 2), torch.ones(3)
    vectors = dict.fromkeys(("running_mean", "running_var", "weight", "bias"), good) | {
        name: torch.ones(size)
    }
    with pytest.raises(RuntimeError, match=rf"{name} should be of shape \[3\], but got \[{size}\]"):
        batch_renorm(x, **vectors, training=True)
    assert (good == 1).all()
    assert (vectors[name] == 1).all()


def test_quantization_and_tracing_see_a_plain_module() -> None:
    module = bnfast.BatchRenorm2d(3).eval()
    assert not hasattr(module, "qconfig")
    module.qconfig = "some"
    assert copy.deepcopy(module).qconfig == "some"
    del module.qconfig
    assert not hasattr(module, "qconfig")
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_converters_and_scripting_say_what_to_do() -> None:
    model = nn.Sequential(bnfast.BatchRenorm2d(3))
    with pytest.raises(RuntimeError, match="renormalizes"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(RuntimeError, match="torch.export"):
        torch.jit.script(model)
    assert "r_max=3.0" in repr(model)
    assert isinstance(model[0], nn.modules.batchnorm._BatchNorm)
    assert not isinstance(model[0], nn.BatchNorm2d)
    copied = copy.deepcopy(model)
    assert copied[0].r_max == 3.0


@every_path
@pytest.mark.parametrize("inside", [True, False], ids=["compiled inside", "compiled around"])
def test_recomputation_is_refused_in_compiled_code_too(inside: bool, path: str) -> None:
    """Where what the call is part of shows only when it runs. (PyTorch 2.11's compiler keeps what the kernels
    have made in such a part, and computes nothing again.)"""
    torch._dynamo.reset()
    module = bnfast.BatchRenorm2d(3, warmup_steps=0, r_max_steps=1, d_max_steps=1)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    if inside:
        compiled = torch.compile(module, backend="aot_eager")
        y = checkpoint(compiled, x, use_reentrant=False)
    else:
        compiled = torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), backend="aot_eager")
        y = compiled(x)
    state = copy.deepcopy(module.state_dict())
    if TORCH == (2, 11) and path == "kernels" and not inside:
        twin = bnfast.BatchRenorm2d(3, warmup_steps=0, r_max_steps=1, d_max_steps=1)
        (expected,) = torch.autograd.grad(twin(x).square().sum(), x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        assert bit_identical(dx, expected)
    else:
        with pytest.raises(RuntimeError, match="within a backward"):
            y.square().sum().backward()
    for name, value in module.state_dict().items():
        assert bit_identical(value, state[name]), name


@pytest.mark.parametrize("options", [{"warmup_steps": float("nan")}, {"r_max_steps": float("nan")}], ids=str)
def test_schedules_of_nan(options: Any) -> None:
    with pytest.raises(ValueError, match="0 <= warmup_steps"):
        bnfast.BatchRenorm2d(3, **options)


@every_path
def test_statistics_that_cannot_be_written_to(path: str) -> None:
    with torch.inference_mode():
        module = bnfast.BatchRenorm2d(3)
    before = module.running_mean.clone()
    with pytest.raises(RuntimeError, match="inference tensor"):
        module(torch.randn(4, 3, 2, 2))
    assert bit_identical(module.running_mean, before)
    module = bnfast.BatchRenorm2d(3)
    module.running_mean = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="running_mean should be of floating point"):
        module(torch.randn(4, 3, 2, 2))


@every_path
def test_arguments_of_the_function(path: str) -> None:
    x, mean, var = torch.randn(4, 3, 2, 2), torch.zeros(3), torch.ones(3)
    with pytest.raises(TypeError, match="training"):
        batch_renorm(x, mean, var, training="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="r_max must be at least 1"):
        batch_renorm(x, mean, var, training=False, r_max=0.1)
    assert not mean.any()
    y = batch_renorm(x, mean, var, training=True, r_max=torch.tensor(2.0), d_max=torch.tensor(1))
    torch.testing.assert_close(
        y, batch_renorm(x, torch.zeros(3), torch.ones(3), training=True, r_max=2.0, d_max=1.0)
    )
