"""LayerNorm's inputs, what a function makes of them, and its judgement beside torch, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfast import exact
from bnfast.checks import peers

EPS = 1e-5
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """x, dy: [*, *shape], gamma and beta: [*shape] or None; shape are the last `dims` dimensions."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dims: int = 1

    @property
    def shape(self) -> torch.Size:
        return self.x.shape[-self.dims :]


def given(
    shape: tuple[int, ...], dtype: torch.dtype, *, mean: float = 0.5, parameters: torch.dtype | None = None,
    affine: str = "wb", dims: int = 1, device: str = "cpu", seed: int = 0,
) -> Given:  # fmt: skip
    """Random numbers. affine: which of gamma ("w") and beta ("b") there are."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=device)

    weight, bias = (
        (random(*shape[-dims:]) + 0.5).to(parameters or exact.accumulator(dtype)) for _ in range(2)
    )
    return Given(
        (random(*shape) + mean).to(dtype), random(*shape).to(dtype), weight if "w" in affine else None,
        bias if "b" in affine else None, dims,
    )  # fmt: skip


def run(function: Callable[..., Tensor], g: Given) -> Named:
    """y and all gradients there are."""
    x, weight, bias = (None if t is None else t.detach().requires_grad_() for t in (g.x, g.weight, g.bias))
    assert x is not None
    leaves = {"dx": x, "dweight": weight, "dbias": bias}
    y = function(x, tuple(g.shape), weight, bias, EPS)
    wanted = {name: t for name, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(y, list(wanted.values()), g.dy)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def check(g: Given, ours: Named) -> None:
    """Asserts that all results are good enough."""
    expected = exact.layer_norm(g.x, g.dy, g.dims, g.weight, g.bias, EPS)
    theirs = run(peers.layer_norm, g)
    assert ours.keys() == theirs.keys()
    accumulator = exact.accumulator(g.x.dtype)
    for name, value in ours.items():
        verdict = exact.judge(value, theirs[name], expected[name], accumulator)
        assert verdict.ok, f"{name}: {verdict}"
