"""Inputs and gradients may lie in memory in any way, saved tensors may come back in another, and what is not
wanted is not computed. Of the functions, beside torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from bnfast import functional
from tests.support import kernel_calls
from tests.support.buffers import bit_identical
from tests.support.layers import (
    CLOSE,
    NORMS,
    assert_same,
    both_layouts,
    both_modes,
    data,
    derivatives,
    every_norm,
    every_path,
    norms,
    parameters,
)
from tests.support.versions import TORCH

SHAPE = (3, 4, 2, 3)
Arrange = Callable[[Tensor], Tensor]
LAST = torch.channels_last

INPUTS: dict[str, tuple[tuple[int, ...], Arrange]] = {
    "transposed": ((4, 3, 2, 5), lambda x: x.transpose(0, 1)),
    "height and width swapped": ((3, 4, 4, 5), lambda x: x.transpose(2, 3)),
    "2-D transposed": ((12, 7), torch.t),
    "unaligned": ((1 + 3 * 4 * 3 * 3,), lambda x: x[1:].view(3, 4, 3, 3)),
    "unaligned channels_last": ((1 + 3 * 3 * 3 * 4,), lambda x: x[1:].view(3, 3, 3, 4).permute(0, 3, 1, 2)),
    "channels_last": ((2, 5, 2, 6), lambda x: x.contiguous(memory_format=LAST)),
    "channels sliced": ((3, 6, 2, 3), lambda x: x[:, 1:5]),
    "strided": ((3, 4, 6, 3), lambda x: x[:, :, ::2]),
    "rows strided": ((3, 4, 2, 6), lambda x: x[..., ::2]),
    "expanded over N": ((1, 4, 2, 3), lambda x: x.expand(3, 4, 2, 3)),
    "expanded over C": ((3, 1, 2, 3), lambda x: x.expand(3, 4, 2, 3)),
    "flipped 3-D": ((3, 4, 5), lambda x: x.flip(0).transpose(1, 2)),
    "5-D permuted": ((2, 2, 3, 4, 3), lambda x: x.permute(1, 2, 0, 4, 3)),
}


@pytest.mark.parametrize(("shape", "arrange"), INPUTS.values(), ids=INPUTS.keys())
@every_norm
def test_inputs_of_any_strides(norm: str, shape: tuple[int, ...], arrange: Arrange) -> None:
    if norm == "instance" and len(shape) == 2:
        pytest.skip("InstanceNorm of one value is an error")
    leaf, results = data(*shape), []
    for function in norms(norm):
        x = leaf.clone().requires_grad_()
        given = parameters(norm, arrange(x))
        y = function(arrange(x), *given)
        gradients = torch.autograd.grad(y, [x, *given], data(*y.shape, seed=5))
        results.append([y.detach(), *gradients])
        assert bit_identical(x, leaf)
    assert_close(*results, **CLOSE)
    if not norm.startswith("instance"):
        assert results[0][0].stride() == results[1][0].stride()


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded to all": torch.sum,
    "expanded over N": lambda y: (y.sum(0) * data(*y.shape[1:], seed=5)).sum(),
    "expanded over a plane": lambda y: (y.mean((2, 3)) * data(*y.shape[:2], seed=5)).sum(),
    "sliced": lambda y: (torch.cat([y, y[:, :1]], 1) * data(y.shape[0], y.shape[1] + 1, *y.shape[2:])).sum(),
    "rows sliced": lambda y: (torch.cat([y, y], 3)[..., ::2] * data(*y.shape, seed=5)).sum(),
    "transposed": lambda y: (y.transpose(0, 1) * data(y.shape[1], y.shape[0], *y.shape[2:], seed=5)).sum(),
    "plane transposed": lambda y: (y.transpose(2, 3) * data(*y.transpose(2, 3).shape, seed=5)).sum(),
    "contiguous": lambda y: (y.contiguous() * data(*y.shape, seed=5)).sum(),
    "channels_last": lambda y: (y.contiguous(memory_format=LAST) * data(*y.shape, seed=5, last=True)).sum(),
    "unaligned": lambda y: (F.pad(y.flatten(), (1, 0)) * data(y.numel() + 1, seed=5)).sum(),
}


@both_layouts
@pytest.mark.parametrize("finish", GRADIENTS.values(), ids=GRADIENTS.keys())
@every_norm
def test_gradients_of_any_strides(norm: str, finish: Any, last: bool) -> None:
    """As their producers leave them. Judged by torch in fp64, with a dense gradient: torch's own treatment of
    strides is not what is asked here."""
    ours, theirs = norms(norm)
    x = data(*SHAPE, last=last).requires_grad_()
    given = parameters(norm, x)
    y = ours(x, *given)
    seen: list[tuple[int, ...]] = []
    y.register_hook(lambda dy: seen.append(dy.stride()))
    finish(y).backward()
    wide = [t.detach().double() for t in (x, *given)]
    leaf = theirs(*wide).detach().requires_grad_()
    finish(leaf).backward()
    expected = derivatives(theirs, wide[0].contiguous(), wide[1:], leaf.grad.contiguous())
    found = {"y": y.detach(), "dx": x.grad, "dweight": given[0].grad, "dbias": given[1].grad}
    assert_same(found, {name: t.float() for name, t in expected.items()}, check_stride=False)
    assert len(seen) == 1
    if norm != "layer":
        assert x.grad.stride() == x.stride()


def strided(t: Tensor) -> Tensor:
    other = torch.full_like(t, float("nan")) if t.is_floating_point() else ~t
    return torch.stack((t, other), -1)[..., 0]


def misaligned(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride(), 1).copy_(t)


def reversed_strides(t: Tensor) -> Tensor:
    dims = list(range(t.dim()))[::-1]
    return t.permute(dims).contiguous().permute(dims)


def expanded(t: Tensor) -> Tensor:
    """One value for all but the first dimension (of a vector: for all)."""
    first = t[:1] if t.dim() == 1 else t[(slice(None), *[slice(1)] * (t.dim() - 1))]
    assert torch.equal(first.expand(t.shape), t), "this test's data cannot be expanded"
    return first.expand(t.shape)


FOLLOWED = {"alone": None, "relu": "relu", "silu": "silu"}


@every_path
@both_layouts
@pytest.mark.parametrize("after", FOLLOWED.values(), ids=FOLLOWED.keys())
@pytest.mark.parametrize("unpack", [strided, misaligned, reversed_strides])
@every_norm
def test_saved_tensors_come_back_in_other_memory(
    norm: str, unpack: Arrange, after: str | None, last: bool, path: str
) -> None:
    """Offloading and compressing hooks owe nobody the strides of what they were given."""
    if path == "torch" and (norm == "layer" or (norm == "group" and TORCH == (2, 11))):
        pytest.skip("torch's own function takes them for dense")
    x, z = data(2, 4, 4, 8, last=last), data(2, 4, 4, 8, seed=7)
    options: Any = {} if after is None else {"activation": after, "residual": z}
    ours, _ = norms(norm)
    expected = derivatives(ours, x, parameters(norm, x), **options)
    unpacked = []

    def back(t: Tensor) -> Tensor:
        unpacked.append(t)
        return unpack(t) if t.numel() else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, back):
        found = derivatives(ours, x, parameters(norm, x), **options)
    assert len(unpacked) >= 3
    assert_same(found, expected)


@every_path
@both_layouts
@both_modes
def test_saved_tensors_come_back_expanded(last: bool, training: bool, path: str) -> None:
    x = data(3, 1, 1, 1).expand(SHAPE).contiguous(memory_format=LAST if last else torch.contiguous_format)
    given = [torch.full((4,), value) for value in (0.7, 0.3)]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.batch_norm(x, torch.ones(4), torch.ones(4) * 2, weight, bias, training)

    expected = derivatives(function, x, given)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: expanded(t) if t.numel() else t):
        assert_same(derivatives(function, x, given), expected)


SUBSETS = [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False) if a or b or c]
HOSTS = {"instance": "group", "instance, eval": "batch"}


@pytest.mark.parametrize(
    "wanted", SUBSETS, ids=lambda s: "+".join(n for n, w in zip("xwb", s, strict=True) if w)
)
@every_norm
def test_only_the_gradients_needed(norm: str, wanted: tuple[bool, bool, bool]) -> None:
    """A frozen parameter costs nothing: its gradient is not computed, and the others are what they were."""
    results = []
    with kernel_calls.gradients_asked_for() as asked:
        for function in norms(norm):
            x = data(*SHAPE)
            leaves = [x, *parameters(norm, x)]
            for leaf, need in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(need)
            function(*leaves).backward(data(*SHAPE, seed=5))
            results.append([leaf.grad for leaf in leaves])
    assert_close(*results, **CLOSE)
    assert asked == [wanted]


@every_path
@every_norm
def test_without_parameters_and_gradients(norm: str, path: str) -> None:
    """A Triton library wrote its statistics over the input's first elements when there were no buffers."""
    ours, theirs = norms(norm)
    x, before = data(*SHAPE), data(*SHAPE)
    y = ours(x)
    assert bit_identical(x, before)
    assert_close(y, theirs(x), **CLOSE)


@every_norm
def test_a_parameter_alone(norm: str) -> None:
    """What the other one's absence stands for is 1 and 0."""
    ours, _ = norms(norm)
    x = data(*SHAPE)
    weight, bias = parameters(norm, x)
    one, zero = torch.ones_like(weight), torch.zeros_like(bias)
    for given, alone, both in (
        (weight, lambda x, w: ours(x, w, None), lambda x, w: ours(x, w, zero)),
        (bias, lambda x, b: ours(x, None, b), lambda x, b: ours(x, one, b)),
    ):
        assert_same(derivatives(alone, x, [given]), derivatives(both, x, [given]))


@every_norm
def test_one_graph_twice(norm: str) -> None:
    """The second pass finds everything as the first did, down to the bits."""
    x, dy = data(*SHAPE).requires_grad_(), data(*SHAPE, seed=5)
    given = parameters(norm, x)
    y = norms(norm)[0](x, *given)
    first, second = (torch.autograd.grad(y, [x, *given], dy, retain_graph=True) for _ in range(2))
    assert all(bit_identical(a, b) for a, b in zip(first, second, strict=True))
    torch.autograd.grad(y, x, dy)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, dy)


@every_path
@every_norm
def test_the_output_may_be_overwritten(norm: str, path: str) -> None:
    """ReLU in place, the usual thing after a normalization: the backward keeps x, not y."""
    x = data(*SHAPE)
    found, expected = (
        derivatives(lambda *given, f=f: F.relu(f(*given), inplace=True), x, parameters(norm, x))
        for f in norms(norm)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("norm", [name for name in NORMS if "," not in name])
def test_too_large_goes_to_torch(norm: str, direction: str) -> None:
    ours, theirs = norms(norm)
    x = data(*SHAPE)
    with kernel_calls.refusing(HOSTS.get(norm, norm), direction):
        found = derivatives(ours, x, parameters(norm, x))
    assert_same(found, derivatives(theirs, x, parameters(norm, x)))
