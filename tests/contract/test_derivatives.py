"""Derivatives of every order: gradcheck and gradgradcheck in fp64, functorch's transforms, forward mode, and
buffers that change in between. Where torch.nn's layer raises, ours raises the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from tests.support.layers import (
    BY_NAME,
    NORMS,
    Layer,
    Options,
    both_modes,
    data,
    every_path,
    norms,
    tracking,
)
from tests.support.versions import TORCH

FP64 = torch.float64
SHAPES = {"2-D": ((4, 2), False), "4-D": ((2, 2, 2, 3), False), "4-D channels_last": ((2, 2, 2, 3), True)}
CHECKED = [
    pytest.param(norm, *SHAPES[kind], affine, id=f"{norm}-{kind}-{affine or 'bare'}")
    for norm in NORMS
    for kind in SHAPES
    for affine in ("wb", "w", "")
    # a row, a group or a sample of two values or of one has hardly a derivative
    if norm != "batch, tracking" and (kind != "2-D" or norm.startswith("batch"))
]
ROWS = [pytest.param("layer", (4, 3), False, affine, id=f"rows-{affine}") for affine in ("wb", "w", "b", "")]


@pytest.mark.parametrize(("norm", "shape", "last", "affine"), [*CHECKED, *ROWS])
def test_gradcheck(norm: str, shape: tuple[int, ...], last: bool, affine: str, launches: list[Any]) -> None:
    """First and second derivatives against finite differences; batched gradients against one by one."""
    x = data(*shape, dtype=FP64, last=last).requires_grad_()
    size = shape[-1] if norm == "layer" else shape[1]
    given = [data(size, seed=n, dtype=FP64).requires_grad_() for n in range(len(affine))]

    def function(x: Tensor, *given: Tensor) -> Tensor:
        named = dict(zip(affine, given, strict=True))
        return norms(norm)[0](x, named.get("w"), named.get("b"), eps=1e-2)

    # Every input alone where that is cheap; else random directions through all of them, a few calls.
    options = {"check_batched_grad": True}
    fast = len(shape) > 2
    assert torch.autograd.gradcheck(function, (x, *given), fast_mode=fast, **options)
    assert launches
    assert torch.autograd.gradgradcheck(function, (x, *given), fast_mode=True, **options)


def cube(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).pow(3).sum()


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return data(*shape, seed=seed, dtype=FP64)


def per_sample(module: nn.Module) -> Any:
    state = {k: v.detach() for k, v in module.named_parameters()}

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = functional_call(module, state, (x[None],))
        return (y**3).sum()

    return vmap(grad(loss), (None, 0))(state, doubles(4, 2, 3))


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda m: vmap(m)(doubles(3, 4, 2, 3)),
    "vmap in_dims": lambda m: vmap(m, in_dims=1, out_dims=2)(doubles(4, 3, 2, 3)),
    "vmap(grad)": lambda m: vmap(grad(cube(m)))(doubles(3, 4, 2, 3)),
    "grad": lambda m: grad(cube(m))(doubles(4, 2, 3)),
    "per sample": per_sample,
    "jvp": lambda m: jvp(m, (doubles(4, 2, 3),), (doubles(4, 2, 3, seed=1),)),
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
    "batch": (replace(BY_NAME["BatchNorm1d"], arguments=(2,)), {}),
    "batch, no statistics": (replace(BY_NAME["BatchNorm1d"], arguments=(2,)), {"track_running_stats": False}),
    "group": (replace(BY_NAME["GroupNorm"], arguments=(1, 2)), {}),
    "instance": (replace(BY_NAME["InstanceNorm1d"], arguments=(2,)), {"affine": True}),
    "instance, tracking": (replace(BY_NAME["InstanceNorm1d"], arguments=(2,)), {"track_running_stats": True}),
    "layer": (replace(BY_NAME["LayerNorm"], arguments=(3,)), {}),
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


def gradients(layer: nn.Module, x: Tensor, compiled: bool, changed: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y = call(x)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    if changed:
        with torch.no_grad():
            for t in layer.buffers():
                t.add_(7)
    y.backward(data(*y.shape, seed=1))
    for name, t in layer.named_buffers():
        assert torch.equal(t, before[name] + 7 * changed)
    return [x.grad, *(p.grad for p in layer.parameters())]


@every_path
@both_modes
@pytest.mark.parametrize("how", ["eager", "cumulative", "compiled"])
@tracking
def test_buffers_between_forward_and_backward(layer: Layer, how: str, training: bool, path: str) -> None:
    """They change where ranks exchange them, or where an average is reset: no gradient needs them."""
    if layer.name == "FrozenBatchNorm2d":
        pytest.skip("its buffers are its parameters")
    torch._dynamo.reset()
    options = (layer.tracks or {}) | ({"warmup_steps": 0} if "Renorm" in layer.name else {})
    found = []
    for changed in (True, False):
        module = layer.ours(*layer.arguments, **options).train(training)
        if how == "cumulative":
            module.momentum = None
        found.append(gradients(module, layer.input(), how == "compiled", changed))
    assert_close(*found, rtol=0, atol=0)
