"""Misuse raises what torch.nn raises, with its words, before any kernel runs and before anything is updated.
DTensors are refused, with a way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from bnfast.functional import batch_norm
from bnfast.kernels.launch import Launch
from tests.support.buffers import bit_identical
from tests.support.layers import every_path


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Launch, *args: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(Launch, "__call__", refuse)


def x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (2, 4, 3, 3), **options)


def replaced(name: str, value: Tensor | None, training: bool = True) -> Callable[[Any], nn.Module]:
    """A layer of 4 channels with one of its tensors replaced."""

    def make(library: Any) -> nn.Module:
        module = library.BatchNorm2d(4).train(training)
        holder = module._buffers if name in module._buffers else module._parameters
        holder[name] = value
        return module

    return make


def layer(dims: str = "2d", training: bool = True, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda library: getattr(library, f"BatchNorm{dims}")(4, **options).train(training)


MISUSE: dict[str, tuple[Callable[[Any], nn.Module], Tensor, str]] = {
    "3-D into 2d": (layer(), x(2, 4, 3), "expected 4D input (got 3D input)"),
    "5-D into 2d": (layer(), x(2, 4, 3, 3, 3), "expected 4D input (got 5D input)"),
    "4-D into 1d": (layer("1d"), x(), "expected 2D or 3D input (got 4D input)"),
    "1-D into 1d": (layer("1d"), x(4), "expected 2D or 3D input (got 1D input)"),
    "4-D into 3d": (layer("3d"), x(), "expected 5D input (got 4D input)"),
    "more channels": (layer(), x(2, 5, 3, 3), "running_mean should contain 5 elements not 4"),
    "fewer channels": (layer(), x(2, 3, 3, 3), "running_mean should contain 3 elements not 4"),
    "more channels, eval": (
        layer(training=False),
        x(2, 5, 3, 3),
        "running_mean should contain 5 elements not 4",
    ),
    "more channels, no affine": (layer(affine=False), x(2, 5, 3, 3), "running_mean should contain 5"),
    "more channels, no statistics": (
        layer(track_running_stats=False),
        x(2, 5, 3, 3),
        "weight should contain 5",
    ),
    "weight too long": (replaced("weight", x(5)), x(), "weight should contain 4 elements not 5"),
    "bias too long": (replaced("bias", x(5)), x(), "bias should contain 4 elements not 5"),
    "mean too long": (replaced("running_mean", x(5)), x(), "running_mean should contain 4 elements not 5"),
    "variance too long": (replaced("running_var", x(5)), x(), "running_var should contain 4 elements not 5"),
    "variance too long, eval": (replaced("running_var", x(5), False), x(), "running_var should contain 4"),
    "mean of two dimensions": (replaced("running_mean", x(4, 1)), x(), "expected 1 dims"),
    "mean missing": (replaced("running_mean", None), x(), "must either both be None or neither be None"),
    "mean missing, eval": (
        replaced("running_mean", None, False),
        x(),
        "running_mean must be defined in evaluation",
    ),
    "one value a channel": (layer(), x(1, 4, 1, 1), "Expected more than 1 value per channel when training"),
    "one value a channel, 1d": (layer("1d"), x(1, 4), "Expected more than 1 value per channel when training"),
    "eps 0": (layer(eps=0.0), x(), "eps must be positive"),
    "eps negative": (layer(eps=-1.0), x(), "eps must be positive"),
    "eps negative, eval": (layer(training=False, eps=-1.0), x(), "eps must be"),
    "integers": (layer(), x(dtype=torch.int64), "not implemented for 'Long'"),
    "integers, eval": (layer(training=False), x(dtype=torch.int64), "not implemented for 'Long'"),
    "booleans": (layer(), x(dtype=torch.bool), "not implemented for 'Bool'"),
    "complex": (layer(), x(dtype=torch.complex64), "not implemented for 'ComplexFloat'"),
    "float8": (layer(), x().to(torch.float8_e4m3fn), "not implemented for 'Float8_e4m3fn'"),
    "integer weight": (
        replaced("weight", x(4, dtype=torch.int64)),
        x(),
        "expect parameter to have scalar type",
    ),
    "meta input": (layer(), x(device="meta"), "device"),
    "meta layer": (layer(device="meta"), x(), "Tensor on device meta is not on the expected device cpu"),
    "meta layer, eval": (layer(device="meta", training=False), x(), "Tensor on device meta"),
    "meta weight": (replaced("weight", x(4, device="meta")), x(), "Tensor on device meta"),
    "meta mean": (replaced("running_mean", x(4, device="meta")), x(), "Tensor on device meta"),
    "sparse": (layer(), x().to_sparse(), "SparseCPU"),
    "no channels": (lambda library: library.BatchNorm2d(0), x(2, 0, 3, 3), "index 0 out of range"),
    "statistics that want gradients": (
        replaced("running_mean", x(4, requires_grad=True)),
        x(),
        "not differentiable with respect to argument 'running_mean'",
    ),
    "statistics that want gradients, eval": (
        replaced("running_var", x(4, requires_grad=True), False),
        x(),
        "not differentiable with respect to argument 'running_var'",
    ),
}


@every_path
@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("make", "value", "words"), MISUSE.values(), ids=MISUSE.keys())
def test_layer_raises_as_torch(make: Any, value: Tensor, words: str, path: str) -> None:
    """And leaves every buffer as it was: torch has counted the batch by then, we have not."""
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - which one is what is being found out
        make(nn)(value)
    assert words in str(theirs.value), "this test's idea of torch is out of date"
    module = make(bnfast)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(type(theirs.value)) as ours:
        module(value)
    assert type(ours.value) is type(theirs.value)
    assert words in str(ours.value)
    for key, tensor in module.state_dict().items():
        assert tensor.is_meta or bit_identical(tensor, before[key]), key


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "eval without statistics": ({"running_mean": None, "running_var": None}, "running_mean must be defined"),
    "eval with a mean alone": ({"running_var": None}, "running_var must be defined"),
    "training with a mean alone": ({"running_var": None, "training": True}, "must either both be None"),
    "training with a variance alone": ({"running_mean": None, "training": True}, "must either both be None"),
    "momentum None": ({"momentum": None, "training": True}, "argument 'momentum' (position 7) must be float"),
    "momentum None, eval": ({"momentum": None}, "argument 'momentum' (position 7) must be float"),
    "eps 0 in training": ({"eps": 0.0, "training": True}, "eps must be positive"),
    "one value a channel": (
        {"input": x(1, 4, 1), "training": True},
        "Expected more than 1 value per channel",
    ),
    "weight too short": ({"weight": x(3)}, "weight should contain 4 elements not 3"),
}


@every_path
@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(("arguments", "words"), CALLS.values(), ids=CALLS.keys())
def test_function_raises_as_torch(arguments: dict[str, Any], words: str, path: str) -> None:
    given = {"input": x(2, 4, 3), "running_mean": x(4), "running_var": x(4), **arguments}
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - which one is what is being found out
        F.batch_norm(**given)
    assert words in str(theirs.value), "this test's idea of torch is out of date"
    with pytest.raises(type(theirs.value)) as ours:
        batch_norm(**given)
    assert words in str(ours.value)
    for name in ("running_mean", "running_var"):
        assert given[name] is None or bit_identical(given[name], x(4))


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One rank of a process group that talks to nobody."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@every_path
@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("sharded", ["input", "layer"])
def test_dtensor_is_refused(sharded: str, path: str, mesh: Any) -> None:
    """Its statistics would span devices. Computing them shard by shard would be silently wrong."""
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    module: nn.Module = bnfast.BatchNorm2d(4)
    value = x()
    if sharded == "input":
        value = distribute_tensor(value, mesh, [Replicate()])
    else:
        module = distribute_module(module, mesh)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(TypeError, match="FSDP2"):
        module(value)
    for key, tensor in module.state_dict().items():
        assert torch.equal(*(getattr(t, "to_local", lambda t=t: t)() for t in (tensor, before[key])))
