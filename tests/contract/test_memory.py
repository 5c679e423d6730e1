"""What a step computes and keeps: what is not wanted is neither computed nor kept, and what cannot be kept is
refused. Of the functions, alone and followed, beside torch's."""

from __future__ import annotations

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
from tests.support.layers import NORMS, assert_same, attempt, data, derivatives, norms, parameters

SHAPE = (3, 4, 2, 3)
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
            leaves = dict(zip("xwbz", (x, *parameters(norm, x, after)), strict=False))
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
    weight, bias = parameters(norm, x)
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
    leaves = [x, *parameters(norm, x)]
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
        derivatives(lambda *leaves, f=f: F.relu(f(*leaves), inplace=True), x, parameters(norm, x))
        for f in norms(norm)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("after", [None, "relu", "silu"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("norm", [name for name in NORMS if "," not in name])
def test_too_large_goes_to_torch(norm: str, direction: str, after: str | None) -> None:
    ours, theirs = norms(norm)
    x = data(*SHAPE)
    rest = parameters(norm, x, after)
    with kernel_calls.refusing(HOSTS.get(norm, norm), direction):
        found = derivatives(ours, x, rest, activation=after)
    assert_same(found, derivatives(theirs, x, rest, activation=after))


@layers.both_layouts
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("norm", ["batch", "batch, eval", "group", "instance"])
def test_a_mask_is_kept(norm: str, side: int, last: bool) -> None:
    """Of relu with a residual: x, the statistics, the parameters, and a mask, of bits or, where planes are no
    multiple of 8, of bytes; never z or y."""
    x = data(8, 16, side, side, dtype=torch.bfloat16, last=last).requires_grad_()
    *leaves, z = x, *parameters(norm, x, "relu")
    size = x.nbytes // (16 if last or side % 8 == 0 else 2)
    for after, residual, mask in (("relu", [z], size), ("silu", [z], None), ("relu", [], 0)):
        kept: dict[int, int] = {}  # the bytes of each storage

        def pack(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            norms(norm)[0](*leaves, *residual, activation=after)
        # silu's slope needs z again
        assert (z.untyped_storage().data_ptr() in kept) == (mask is None)
        assert mask is None or sum(kept.values()) <= x.nbytes + mask + 4096


@layers.both_layouts
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("norm", ["batch", "batch, eval", "group", "instance"])
def test_a_mask_lets_nan_through(norm: str, side: int, last: bool) -> None:
    """As torch's relu does: a residual that is not a number has the gradient of y."""
    x = data(2, 16, side, side, last=last)
    rest = parameters(norm, x, "relu")
    z = rest[-1].detach().clone()
    z[1, 3, 2, 1] = float("nan")
    z.requires_grad_()
    y = norms(norm)[0](x.requires_grad_(), *rest[:-1], z, activation="relu")
    (dz,) = torch.autograd.grad(y, z, torch.full_like(y, 2.0))
    assert y.isnan().sum() == 1
    assert dz[1, 3, 2, 1] == 2.0
    assert_close(dz, 2.0 * ~(y <= 0))


NAMES = ("x", "weight", "bias", "running_mean", "running_var")
INFERENCE = [
    (names, wanted)
    for names in (*((name,) for name in NAMES), NAMES[1:3], NAMES[3:], NAMES)
    for wanted in ("x", "weight", "bias", "nothing")
    if wanted not in names  # an inference tensor wants no gradient
]


def arguments() -> dict[str, Tensor]:
    given = {name: data(4, seed=n).square() + 0.5 for n, name in enumerate(NAMES)}
    return {**given, "x": data(*SHAPE)}


@layers.every_path
@layers.both_modes
@pytest.mark.parametrize(("inference", "wanted"), INFERENCE, ids=str)
def test_inference_tensors_outside_inference_mode(
    inference: tuple[str, ...], wanted: str, training: bool, path: str
) -> None:
    """Where torch refuses to save them for a backward, ours refuses it too, and updates nothing. In eval ours
    saves no statistics, so these do not forbid a gradient, as they do in torch."""

    def run(function: Any, x: Tensor, running_mean: Tensor, running_var: Tensor, **rest: Tensor) -> Any:
        leaves = [t for t in (x, *rest.values()) if t.requires_grad]
        y = function(x, running_mean, running_var, **rest, training=training)
        gradients = torch.autograd.grad(y, leaves, data(*SHAPE, seed=5)) if leaves else ()
        return y.detach(), gradients, y.requires_grad, running_mean.clone(), running_var.clone()

    results = []
    for function in (F.batch_norm, functional.batch_norm):
        given = arguments()
        for name in inference:
            if training or function is not F.batch_norm or "running" not in name:
                with torch.inference_mode():
                    given[name] = given[name].clone()
        if wanted in given:
            given[wanted].requires_grad_()
        results.append(attempt(lambda f=function, g=given: run(f, **g)))
    theirs, ours = results
    if isinstance(theirs, type):
        assert ours is theirs
        assert all(bit_identical(given[name].clone(), value) for name, value in arguments().items())
    else:
        assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
