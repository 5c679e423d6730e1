"""Cells of one value and eps=0: no variance to divide by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bnfast
from tests.support.versions import EPS_0_IN_EVAL

both_paths = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)
# held by a program and swept; in tiles and runs
SHAPES = {"held": (2, 4, 3, 5), "swept": (2, 4, 3, 5), "long": (1, 2, 1, 20993)}


def constant(name: str, value: float) -> Tensor:
    x = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(0))
    x[0, :] = value  # the other sample, if any, is an ordinary one
    return x.contiguous(memory_format=torch.channels_last) if name == "swept" else x


def weight_and_bias(layer: torch.nn.Module) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 1 + len(layer.weight)))
        layer.bias.copy_(torch.arange(5.0, 5 + len(layer.bias)))


def step(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of x, weight and bias."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y.detach(), list(torch.autograd.grad(y, [x, layer.weight, layer.bias], dy))


@both_paths
@pytest.mark.parametrize(
    ("name", "value"),
    [("long", 2.5), *((name, v) for name in ("held", "swept") for v in (0.0, 0.1, -1e4 / 3))],
)
def test_instance_norm(name: str, value: float, path: str) -> None:
    """The bias, as of torch's layer: the values are their mean. Their gradient is 0, and weight has none from
    them."""
    x = constant(name, value)
    ours = bnfast.InstanceNorm2d(x.shape[1], eps=0.0, affine=True)
    theirs = torch.nn.InstanceNorm2d(x.shape[1], eps=0.0, affine=True)
    for layer in (ours, theirs):
        weight_and_bias(layer)
    y, (dx, *others) = step(ours, x)
    assert torch.equal(y[0], ours.bias.detach()[:, None, None].expand_as(y[0]))
    assert not dx[0].any()
    expected, (expected_dx, *rest) = step(theirs, x)
    assert not expected_dx[0].any()
    torch.testing.assert_close([y, dx, *others], [expected, expected_dx, *rest], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_group_norm(name: str, groups: int) -> None:
    """The kernels do as for InstanceNorm. (torch's GroupNorm gives NaN, or noise in channels_last.)"""
    x = constant(name, 2.5)
    layer = bnfast.GroupNorm(groups, x.shape[1], eps=0.0)
    weight_and_bias(layer)
    y, (dx, dweight, dbias) = step(layer, x)
    assert torch.equal(y[0], layer.bias.detach()[:, None, None].expand_as(y[0]))
    assert not dx[0].any()
    assert all(t.isfinite().all() for t in (y, dx, dweight, dbias))


@both_paths
@pytest.mark.parametrize("name", ["held", "swept"])
def test_a_running_variance_of_0(name: str, path: str) -> None:
    """In eval nothing finite comes of it (torch gives NaN on CPU, NaN or an infinity on CUDA)."""
    if path == "torch" and not EPS_0_IN_EVAL:
        pytest.skip("this PyTorch refuses eps=0 in eval")
    layer = bnfast.BatchNorm2d(4, eps=0.0).eval()
    layer.running_var[1] = 0.0
    y = layer(constant(name, 2.5))
    assert not y[:, 1].isfinite().any()
    assert y[:, [0, 2, 3]].isfinite().all()
