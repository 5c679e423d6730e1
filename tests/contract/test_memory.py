"""Inputs, residuals and gradients may lie in memory in any way, saved tensors may come back in another, and
what is not wanted is neither computed nor kept. Of the functions, alone and followed, beside torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from bnfast import functional
from tests.support import kernel_calls, layers
from tests.support.buffers import bit_identical
from tests.support.layers import CLOSE, NORMS, assert_same, data, derivatives, norms
from tests.support.versions import TORCH

SHAPE = (3, 4, 2, 3)
Arrange = Callable[[Tensor], Tensor]
LAST = torch.channels_last
followed = pytest.mark.parametrize("after", [None, "relu", "silu"], ids=["alone", "relu", "silu"])


def given(norm: str, x: Tensor, after: str | None = None) -> list[Tensor]:
    """A weight, a bias and, where an activation follows, a residual, all of which want gradients."""
    residuals = [data(*x.shape, seed=7, dtype=x.dtype).requires_grad_()] if after else []
    return [*layers.parameters(norm, x), *residuals]


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


@pytest.mark.parametrize("of", ["x", "x, followed", "residual"])
@pytest.mark.parametrize(("shape", "arrange"), INPUTS.values(), ids=INPUTS.keys())
@layers.every_norm
def test_inputs_of_any_strides(norm: str, shape: tuple[int, ...], arrange: Arrange, of: str) -> None:
    if norm == "instance" and len(shape) == 2:
        pytest.skip("InstanceNorm of one value is an error")
    leaf, results = data(*shape), []
    for function in norms(norm):
        memory = leaf.clone()
        arranged = arrange(memory).requires_grad_()
        x = data(*arranged.shape, seed=1).requires_grad_() if of == "residual" else arranged
        w, b, *z = given(norm, x, None if of == "x" else "relu")
        z = [arranged] if of == "residual" else z
        y = function(x, w, b, *z, activation="relu" if z else None)
        results.append([y.detach(), *torch.autograd.grad(y, [x, w, b, *z], data(*y.shape, seed=5))])
        assert bit_identical(memory, leaf)
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


@layers.both_layouts
@pytest.mark.parametrize("after", [None, "relu"])
@pytest.mark.parametrize("finish", GRADIENTS.values(), ids=GRADIENTS.keys())
@layers.every_norm
def test_gradients_of_any_strides(norm: str, finish: Any, after: str | None, last: bool) -> None:
    """As their producers leave them. Judged by torch in fp64, with a dense gradient: torch's own treatment of
    strides is not under test here."""
    ours, theirs = norms(norm)
    x = data(*SHAPE, last=last).requires_grad_()
    rest = given(norm, x, after)
    y = ours(x, *rest, activation=after)
    seen: list[tuple[int, ...]] = []
    y.register_hook(lambda dy: seen.append(dy.stride()))
    finish(y).backward()
    wide = [t.detach().double() for t in (x, *rest)]
    leaf = theirs(*wide, activation=after).detach().requires_grad_()
    finish(leaf).backward()
    expected = derivatives(theirs, wide[0].contiguous(), wide[1:], leaf.grad.contiguous(), activation=after)
    found = dict(zip(expected, (y.detach(), x.grad, *(t.grad for t in rest)), strict=True))
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


def other_format(t: Tensor) -> Tensor:
    """As hooks that restore everything to one memory format do."""
    format_of_others = LAST if t.is_contiguous() else torch.contiguous_format
    return t.contiguous(memory_format=format_of_others) if t.dim() == 4 else t


@layers.every_path
@layers.both_layouts
@followed
@pytest.mark.parametrize("unpack", [strided, misaligned, reversed_strides, other_format])
@layers.every_norm
def test_saved_tensors_come_back_in_other_memory(
    norm: str, unpack: Arrange, after: str | None, last: bool, path: str
) -> None:
    """Hooks that offload or compress need not keep the strides of what they were given."""
    if path == "torch" and (norm == "layer" or (norm == "group" and TORCH == (2, 11))):
        pytest.skip("torch's own function takes them for dense")
    x = data(2, 8, 4, 8, last=last)
    rest, (ours, _), unpacked = given(norm, x, after), norms(norm), []
    expected = derivatives(ours, x, rest, activation=after)

    def back(t: Tensor) -> Tensor:
        unpacked.append(t)
        return unpack(t) if t.numel() else t

    with saved_tensors_hooks(torch.clone, back):
        found = derivatives(ours, x, rest, activation=after)
    assert len(unpacked) >= 3
    mask = path == "kernels" and after == "relu" and norm != "layer"
    assert any(t.dtype == torch.uint8 for t in unpacked) == mask
    assert_same(found, expected, check_stride=False)


@layers.every_path
@layers.both_layouts
@layers.both_modes
def test_saved_tensors_come_back_expanded(last: bool, training: bool, path: str) -> None:
    x = data(3, 1, 1, 1).expand(SHAPE).contiguous(memory_format=LAST if last else torch.contiguous_format)
    vectors = [torch.full((4,), value) for value in (0.7, 0.3)]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.batch_norm(x, torch.ones(4), torch.ones(4) * 2, weight, bias, training)

    expected = derivatives(function, x, vectors)
    with saved_tensors_hooks(lambda t: t, lambda t: expanded(t) if t.numel() else t):
        assert_same(derivatives(function, x, vectors), expected)


WANTED = [(None, wanted) for wanted in ("x", "w", "b", "xw", "xb", "wb", "xwb")]
WANTED += [("relu", wanted) for wanted in ("x", "w", "z", "bz", "xz")]
HOSTS = {"instance": "group", "instance, eval": "batch"}


@pytest.mark.parametrize(("after", "wanted"), WANTED)
@layers.every_norm
def test_only_the_gradients_needed(norm: str, after: str | None, wanted: str) -> None:
    """A frozen parameter costs nothing: its gradient is not computed, and the others are what they were."""
    results = []
    with kernel_calls.gradients_asked_for() as asked:
        for function in norms(norm):
            x = data(*SHAPE)
            leaves = dict(zip("xwbz", (x, *given(norm, x, after)), strict=False))
            for name, leaf in leaves.items():
                leaf.requires_grad_(name in wanted)
            function(*leaves.values(), activation=after).backward(data(*SHAPE, seed=5))
            results.append({name: leaf.grad for name, leaf in leaves.items()})
    assert_same(*results)
    assert asked == [tuple(name in wanted for name in "xwb")]


@layers.every_norm
def test_a_parameter_alone(norm: str) -> None:
    """What the other one's absence stands for is 1 and 0."""
    ours, x = norms(norm)[0], data(*SHAPE)
    weight, bias = layers.parameters(norm, x)
    one, zero = torch.ones_like(weight), torch.zeros_like(bias)
    for vector, alone, both in (
        (weight, lambda x, w: ours(x, w, None), lambda x, w: ours(x, w, zero)),
        (bias, lambda x, b: ours(x, None, b), lambda x, b: ours(x, one, b)),
    ):
        assert_same(derivatives(alone, x, [vector]), derivatives(both, x, [vector]))


@layers.every_norm
def test_one_graph_twice(norm: str) -> None:
    """The second pass finds everything as the first did, down to the bits."""
    x, dy = data(*SHAPE).requires_grad_(), data(*SHAPE, seed=5)
    leaves = [x, *given(norm, x)]
    y = norms(norm)[0](*leaves)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert all(bit_identical(a, b) for a, b in zip(first, second, strict=True))
    torch.autograd.grad(y, x, dy)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, dy)


@layers.every_path
@layers.every_norm
def test_the_output_may_be_overwritten(norm: str, path: str) -> None:
    """ReLU in place, the usual thing after a normalization: the backward keeps x, not y."""
    x = data(*SHAPE)
    found, expected = (
        derivatives(lambda *leaves, f=f: F.relu(f(*leaves), inplace=True), x, given(norm, x))
        for f in norms(norm)
    )
    assert_same(found, expected)


@followed
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("norm", [name for name in NORMS if "," not in name])
def test_too_large_goes_to_torch(norm: str, direction: str, after: str | None) -> None:
    ours, theirs = norms(norm)
    x = data(*SHAPE)
    rest = given(norm, x, after)
    with kernel_calls.refusing(HOSTS.get(norm, norm), direction):
        found = derivatives(ours, x, rest, activation=after)
    assert_same(found, derivatives(theirs, x, rest, activation=after))


@layers.both_layouts
@pytest.mark.parametrize("norm", ["batch", "batch, eval", "group", "instance"])
def test_a_bit_for_each_element_is_kept(norm: str, last: bool) -> None:
    """Of relu with a residual: x, the statistics, the parameters, and T / 16 of mask; never z or y."""
    x = data(8, 16, 8, 8, dtype=torch.bfloat16, last=last).requires_grad_()
    *leaves, z = x, *given(norm, x, "relu")
    for after, residual, mask in (("relu", [z], x.nbytes // 16), ("silu", [z], None), ("relu", [], 0)):
        kept: dict[int, int] = {}  # the bytes of each storage

        def pack(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            norms(norm)[0](*leaves, *residual, activation=after)
        # silu's slope needs z again
        assert (z.untyped_storage().data_ptr() in kept) == (mask is None)
        assert mask is None or sum(kept.values()) <= x.nbytes + mask + 4096
