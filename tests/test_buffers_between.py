"""Buffers may change between a forward and its backward, as they do where ranks exchange them or an average
is reset: no gradient needs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast

every_path = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)
LAYERS: dict[str, Any] = {
    "batch": lambda: bnfast.BatchNorm2d(3),
    "cumulative": lambda: bnfast.BatchNorm2d(3, momentum=None),
    "renorm": lambda: bnfast.BatchRenorm2d(3, warmup_steps=0),
    "instance": lambda: bnfast.InstanceNorm2d(3, affine=True, track_running_stats=True),
}


def gradients(layer: nn.Module, compiled: bool, changed: bool) -> list[Tensor]:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dy = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y = call(x)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    if changed:
        with torch.no_grad():
            for t in layer.buffers():
                t.add_(7)
    y.backward(dy)
    for name, t in layer.named_buffers():
        assert torch.equal(t, before[name] + 7 * changed)
    return [x.grad, *(p.grad for p in layer.parameters())]


@every_path
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*LAYERS, "batch, compiled"])
def test_buffers_between_forward_and_backward(name: str, training: bool, path: str) -> None:
    torch._dynamo.reset()
    kind, _, compiled = name.partition(", ")
    found = [gradients(LAYERS[kind]().train(training), bool(compiled), changed) for changed in (True, False)]
    assert_close(*found, rtol=0, atol=0)


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
