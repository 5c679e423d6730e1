"""FrozenBatchNorm2d: constants in training as in eval, gradients to the input, torchvision's four keys."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfast
from tests.support.buffers import bit_identical

every_path = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)
KEYS = ["weight", "bias", "running_mean", "running_var"]


def layer(channels: int = 6, **options: Any) -> bnfast.FrozenBatchNorm2d:
    made = bnfast.FrozenBatchNorm2d(channels, **options)
    generator = torch.Generator().manual_seed(3)
    for t in made.state_dict().values():
        t.copy_(torch.rand(channels, generator=generator) + 0.5)
    return made


def formula(frozen: bnfast.FrozenBatchNorm2d, x: Tensor) -> Tensor:
    weight, bias, mean, variance = (
        t.double().view(1, -1, 1, 1) for t in (getattr(frozen, name) for name in KEYS)
    )
    return (x - mean) * (variance + frozen.eps).rsqrt() * weight + bias


@every_path
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_values_gradients_and_constants(
    path: str, training: bool, memory_format: torch.memory_format
) -> None:
    frozen = layer().double().train(training)
    before = copy.deepcopy(frozen.state_dict())
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64).contiguous(memory_format=memory_format)
    z, dy = torch.randn_like(x), torch.randn_like(x)
    for residual in (None, z):
        leaf = x.clone().requires_grad_()
        y = frozen.normalize(leaf, bnfast.Activation("relu"), residual)
        twin = x.clone().requires_grad_()
        expected = (formula(frozen, twin) + (0 if residual is None else residual)).relu()
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=memory_format)
        gradients = [torch.autograd.grad(out, at, dy)[0] for out, at in ((y, leaf), (expected, twin))]
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(frozen(x), formula(frozen, x))
    assert all(bit_identical(t, before[name]) for name, t in frozen.state_dict().items())
    assert not list(frozen.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    frozen, x = layer(), torch.randn(2, 6, 3, 3).to(dtype)
    y = frozen(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), formula(frozen, x.double()), rtol=1e-2, atol=1e-2)


def test_state() -> None:
    frozen = layer()
    assert list(frozen.state_dict()) == KEYS
    theirs = nn.BatchNorm2d(6)
    theirs(torch.randn(4, 6, 3, 3))
    assert frozen.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(frozen(x), theirs.eval()(x))
    # what detectron2's layer asks before it takes eps out of running_var
    assert frozen.state_dict()._metadata[""]["version"] == 3
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        torch.testing.assert_close(again(x), frozen(x))
    assert repr(layer(6, eps=1e-3, activation="silu")) == "FrozenBatchNorm2d(6, eps=0.001, activation=silu)"


def test_only_planes() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        layer()(torch.randn(2, 6, 3))


def test_graphs() -> None:
    frozen, x = layer(activation="relu"), torch.randn(2, 6, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), frozen(x))
    exported = torch.export.export(frozen, (x,)).module()
    torch.testing.assert_close(exported(x), frozen(x))
    plain = layer()
    torch.testing.assert_close(torch.jit.script(plain)(x), plain(x))
    with pytest.raises(RuntimeError, match="torch.export"):
        torch.jit.script(frozen)


def test_is_fused_with_what_follows() -> None:
    """The backbone of a detector."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), layer(), nn.ReLU()).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = model(x)
    fused = bnfast.fuse(model)
    assert len(bnfast.fusion_report(fused).fused) == 1
    torch.testing.assert_close(fused(x), expected)
