"""Derivatives of every order: gradcheck and gradgradcheck in fp64, functorch's transforms, forward mode, and
what comes between a forward and its backward. Where torch.nn's layer raises, ours raises the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bnfast
from bnfast.functional import batch_norm, layer_norm
from tests.support.layers import BY_NAME, KINDS, NORMS, Layer, Options, both_modes, data, every_path, norms
from tests.support.versions import TORCH

pytestmark = pytest.mark.compiled

FP64 = torch.float64
SHAPES = {"2-D": ((4, 2), False), "4-D": ((2, 2, 2, 3), False), "4-D channels_last": ((2, 2, 2, 3), True)}
# (norm, shape, channels_last, what is given besides x, the activation that follows)
CHECKED = [
    (norm, *SHAPES[kind], *given)
    for norm in NORMS
    for kind in SHAPES
    for given in (("wb", None), ("w", None), ("", None), ("wbz", "silu"), ("wbz", "relu"))
    # a row, a group or a sample of two values or of one has hardly a derivative
    if norm != "batch, tracking" and (kind != "2-D" or norm.startswith("batch"))
]
ROWS = [("layer", (4, 3), False, given, None) for given in ("wb", "w", "b", "")]


@every_path
@pytest.mark.parametrize("case", [*CHECKED, *ROWS], ids=str)
def test_gradcheck(case: Any, path: str, launches: list[Any]) -> None:
    """First and second derivatives against finite differences; batched gradients against one by one. The
    kernels' gradients are those of the formulas that create_graph=True runs, and x's in the same strides."""
    norm, shape, last, given, activation = case
    if path == "torch" and (norm, given) == ("layer", "b"):
        pytest.skip("torch's own second derivatives of layer_norm are wrong for a bias without a weight")
    x = data(*shape, dtype=FP64, last=last).requires_grad_()
    size = (shape[-1],) if norm == "layer" else (shape[1],)
    leaves = {
        n: doubles(*(shape if n == "z" else size), seed=s).requires_grad_() for s, n in enumerate(given)
    }
    inputs = (x, *leaves.values())

    def function(x: Tensor, *leaves: Tensor) -> Tensor:
        return norms(norm)[0](x, **dict(zip(given, leaves, strict=True)), activation=activation, eps=1e-2)

    # Every input alone where that is cheap; else random directions through all of them, a few calls.
    # torch 2.11's own group_norm has no batched gradients of its gradients
    options = {"check_batched_grad": (TORCH, path, norm) != ((2, 11), "torch", "group")}
    assert torch.autograd.gradcheck(function, inputs, fast_mode=len(shape) > 2, **options)
    assert bool(launches) == (path == "kernels")
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, **options)
    y, dy = function(*inputs), data(*shape, seed=9, dtype=FP64, last=last)
    graph, plain = (torch.autograd.grad(y, inputs, dy, create_graph=create) for create in (True, False))
    assert_close(graph, plain)
    assert graph[0].stride() == plain[0].stride()


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return data(*shape, seed=seed, dtype=FP64)


def cube(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).pow(3).sum()


def per_sample(module: nn.Module) -> Any:
    state = {k: v.detach() for k, v in module.named_parameters()}

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = functional_call(module, state, (x[None],))
        return (y**3).sum()

    return vmap(grad(loss), (None, 0))(state, doubles(4, 2, 3))


def along(name: str) -> Callable[[nn.Module], Any]:
    """In forward mode, through a parameter or a buffer; None if the layer has none of this name."""

    def transform(module: nn.Module) -> Any:
        t = module.state_dict().get(name)
        if t is None:
            return None
        x = doubles(4, 2, 3)
        direction = doubles(*t.shape, seed=5)
        return jvp(lambda t: functional_call(module, {name: t}, x), (t,), (direction,))

    return transform


def along_dy(module: nn.Module) -> Any:
    """In forward mode, through the backward alone."""
    x, dy, direction = (doubles(4, 2, 3, seed=seed) for seed in (0, 4, 5))
    y = module(x.requires_grad_())
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, direction))
        return tuple(forward_ad.unpack_dual(dx))


def along_dy_in_reverse(module: nn.Module) -> Any:
    """What along_dy gives, without forward mode: dx is linear in dy."""
    x, dy, direction = (doubles(4, 2, 3, seed=seed) for seed in (0, 4, 5))
    y = module(x.requires_grad_())
    return tuple(torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in (dy, direction))


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda m: vmap(m)(doubles(3, 4, 2, 3)),
    "vmap in_dims": lambda m: vmap(m, in_dims=1, out_dims=2)(doubles(4, 3, 2, 3)),
    "vmap(grad)": lambda m: vmap(grad(cube(m)))(doubles(3, 4, 2, 3)),
    "grad": lambda m: grad(cube(m))(doubles(4, 2, 3)),
    "per sample": per_sample,
    "jvp": lambda m: jvp(m, (doubles(4, 2, 3),), (doubles(4, 2, 3, seed=1),)),
    "jvp along weight": along("weight"),
    "jvp along running_mean": along("running_mean"),
    "jvp along dy": along_dy,
    "jacrev": lambda m: jacrev(m)(doubles(2, 2, 3)),
    "jacfwd": lambda m: jacfwd(m)(doubles(2, 2, 3)),
    "hessian": lambda m: hessian(cube(m))(doubles(2, 2, 3)),
    "jacobian": lambda m: torch.autograd.functional.jacobian(m, doubles(2, 2, 3)),
    "jacobian vectorize": lambda m: torch.autograd.functional.jacobian(m, doubles(2, 2, 3), vectorize=True),
    "hessian vectorize": lambda m: torch.autograd.functional.hessian(
        cube(m), doubles(2, 2, 3), vectorize=True
    ),
}
TRANSFORMED: dict[str, tuple[Layer, Options]] = {
    name: (replace(BY_NAME[layer], arguments=arguments), options)
    for name, layer, arguments, options in (
        ("batch", "BatchNorm1d", (2,), {}),
        ("batch, no statistics", "BatchNorm1d", (2,), {"track_running_stats": False}),
        ("group", "GroupNorm", (1, 2), {}),
        ("instance", "InstanceNorm1d", (2,), {"affine": True}),
        ("instance, tracking", "InstanceNorm1d", (2,), {"track_running_stats": True}),
        ("layer", "LayerNorm", (3,), {}),
    )
}


@both_modes
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize(("layer", "options"), TRANSFORMED.values(), ids=TRANSFORMED.keys())
def test_transforms_as_torch(
    layer: Layer, options: Options, transform: Any, training: bool, launches: list[Any]
) -> None:
    """What torch can transform, we can, with the same result. What it cannot (in training it would have to
    update buffers that are not transformed), we refuse with the same exception, and update nothing."""
    ours, theirs = (m.train(training) for m in layer.pair(**options, dtype=FP64))
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    try:
        expected = transform(theirs)
    except NotImplementedError:  # torch's group_norm has no forward mode of its backward; ours has
        assert transform is along_dy
        expected = along_dy_in_reverse(theirs)
    except Exception as error:
        if TORCH == (2, 11) and "non-singleton dimension" in str(error):
            pytest.skip("a fault of this PyTorch's group_norm, in which we go another way")
        with pytest.raises(type(error), match="batched tensor|in-place"):
            transform(ours)
        assert_close(ours.state_dict(), before, rtol=0, atol=0)
        return
    assert_close(transform(ours), expected)
    assert_close(ours.state_dict(), theirs.state_dict())
    if transform in (TRANSFORMS["per sample"], TRANSFORMS["jvp"]):
        assert not launches


# FrozenBatchNorm2d's buffers are its parameters.
WITH_BUFFERS = [layer for layer in KINDS if layer.tracks is not None and "Frozen" not in layer.name]


@every_path
@both_modes
@pytest.mark.parametrize("how", ["eager", "cumulative", "compiled"])
@pytest.mark.parametrize("layer", WITH_BUFFERS, ids=str)
def test_buffers_between_forward_and_backward(layer: Layer, how: str, training: bool, path: str) -> None:
    """They change where ranks exchange them, or where an average is reset: no gradient needs them."""
    torch._dynamo.reset()
    options = (layer.tracks or {}) | ({"warmup_steps": 0} if "Renorm" in layer.name else {})
    found = []
    for change in (7, 0):
        module, x = layer.ours(*layer.arguments, **options).train(training), layer.input().requires_grad_()
        if how == "cumulative":
            module.momentum = None
        compiled = how == "compiled"
        y = (torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module)(x)
        before = {name: t.clone() for name, t in module.named_buffers()}
        for t in module.buffers():
            t.add_(change)
        y.backward(data(*y.shape, seed=1))
        for name, t in module.named_buffers():
            assert torch.equal(t, before[name] + change)
        found.append([x.grad, *(p.grad for p in module.parameters())])
    assert_close(*found, rtol=0, atol=0)


def by_hand(x: Tensor, mean: Tensor, variance: Tensor, training: bool) -> Tensor:
    if training:
        mean = x.mean(0)
        variance = (x - mean).square().mean(0)
    return (x - mean) / (variance + 1e-5).sqrt()


@both_modes
def test_fourth_derivative(training: bool) -> None:
    """Judged by elementary operations. torch's own batch_norm cannot judge: in training, its third derivative
    leaves out how the batch statistics depend on x."""

    def fourth(function: Callable[..., Tensor]) -> Tensor:
        x = doubles(3, 2).requires_grad_()
        statistics = doubles(2, seed=5), doubles(2, seed=6).square() + 0.5
        result = function(x, *statistics, training=training).pow(5).sum()
        for seed in (1, 2, 3, 4):
            (slope,) = torch.autograd.grad(result, x, create_graph=True)
            result = (slope * doubles(3, 2, seed=seed)).sum()
        return result

    expected = fourth(by_hand)
    assert expected.abs() > 1e-3
    assert_close(fourth(batch_norm), expected)


@both_modes
def test_double_backward_in_mixed_precision(training: bool) -> None:
    """bf16 activations, fp32 parameters: second-order gradients of their types, with fp64's values."""

    def second(dtype: torch.dtype, wide: torch.dtype, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, dy, direction = (doubles(6, 2, 3, seed=n).bfloat16().to(dtype) for n in (0, 5, 6))
        weight, bias, mean, variance = (
            doubles(2, seed=n).abs().float().to(wide) + 0.25 for n in (1, 2, 3, 4)
        )
        leaves = [t.requires_grad_() for t in (x, weight, dy)]
        y = function(x, mean, variance, weight, bias.requires_grad_(), training=training)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        return torch.autograd.grad((dx * direction).sum() + dweight.square().sum(), leaves)

    ours, exact = second(torch.bfloat16, torch.float32, batch_norm), second(FP64, FP64, F.batch_norm)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for mine, true in zip(ours, exact, strict=True):
        assert (mine.double() - true).norm() <= 2e-2 * true.norm()


def test_anomaly_mode() -> None:
    """A sound backward passes; one that returns NaN is named, with the line of its forward."""
    module, x = bnfast.BatchNorm1d(2), data(4, 2).requires_grad_()
    told = r"(?s)Error detected in BatchNormBackward.*Traceback of forward call.*y = module"
    with torch.autograd.set_detect_anomaly(True):
        module(x).square().sum().backward()
        y = module(x)
        with (
            pytest.warns(UserWarning, match=told),
            pytest.raises(RuntimeError, match="BatchNormBackward.* returned nan"),
        ):
            y.backward(torch.full_like(y, float("nan")))


CALLS: dict[str, Callable[..., Any]] = {
    "checkpoint, reentrant": partial(checkpoint, use_reentrant=True),
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "simply": nn.Module.__call__,
    "penalty": nn.Module.__call__,
}


@every_path
@pytest.mark.parametrize("how", CALLS)
def test_two_batches_then_their_backwards(how: str, path: str) -> None:
    """A discriminator sees a real and a generated batch. A checkpoint runs the forward again: torch.nn counts
    such a batch twice, and so do we. The penalty is WGAN-GP's: the loss holds the norm of a gradient, and
    with an opaque backward it would be silently wrong."""
    layer, results = BY_NAME["BatchNorm1d"], []
    for module in layer.pair(momentum=None, dtype=FP64):
        batches = [layer.input(seed, FP64).requires_grad_() for seed in (1, 2)]
        loss = sum(CALLS[how](module, x).pow(3).sum() for x in batches)
        if how == "penalty":
            slopes = torch.autograd.grad(loss, batches, create_graph=True)
            loss = loss + sum((slope.norm(dim=1) - 1).square().sum() for slope in slopes)
        loss.backward()
        gradients = [x.grad for x in batches] + [p.grad for p in module.parameters()]
        results.append([gradients, module.state_dict()])
    assert results[1][1]["num_batches_tracked"] == (4 if "checkpoint" in how else 2)
    assert_close(*results)


@every_path
def test_code_that_saved_a_buffer_is_told(path: str) -> None:
    """A step changes the buffer in place, while a gradient needs its old value."""
    layer = bnfast.BatchNorm2d(3)
    y = layer.running_mean * torch.ones(3, requires_grad=True)
    layer(data(4, 3, 5, 5).requires_grad_())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_path
def test_a_shape_that_changes_before_the_backward(path: str, launches: list[Any]) -> None:
    """A list belongs to the caller, who may change it; the kernels take it all the same."""
    x, shape = data(4, 3, 6).requires_grad_(), [6]
    y = layer_norm(x, shape)
    assert bool(launches) == (path == "kernels")
    shape.insert(0, 3)
    expected = F.layer_norm(x, [6])
    assert_close(*(torch.autograd.grad(t.square().sum(), x) for t in (y, expected)), rtol=1e-4, atol=1e-5)
