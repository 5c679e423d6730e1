"""LayerNorm's truth in fp64, and the judgement of results beside it: on any device, element by element.

An error may be half a unit in the last place for the rounding of the result, plus a FEW units of the
accumulating type times the *scale* of the element: the size of the terms it is a sum of. No bound grows with
the number of values reduced. The backward gets the mean rounded to the accumulating type, so that rounding,
seen through x - mean, is part of the scale there. The forward does not.

Beside that, the RMS error may be at most twice torch's own at the same dtype, plus a FEW units of the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 4.0
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

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


def given(
    shape: tuple[int, ...], dtype: torch.dtype, *, mean: float = 0.5, parameters: torch.dtype | None = None,
    affine: str = "wb", dims: int = 1, device: str = "cpu", seed: int = 0,
) -> Given:  # fmt: skip
    """Random numbers. affine: which of gamma ("w") and beta ("b") there are."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=device)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = ((random(*shape[-dims:]) + 0.5).to(parameters or wide) for _ in range(2))
    return Given(
        (random(*shape) + mean).to(dtype), random(*shape).to(dtype), weight if "w" in affine else None,
        bias if "b" in affine else None, dims,
    )  # fmt: skip


def run(function: Callable[..., Tensor], g: Given, dtype: torch.dtype | None = None) -> Named:
    """y and all gradients there are. dtype: of everything, or None for what is given."""
    x, dy, weight, bias = (
        None if t is None else t.detach().to(dtype or t.dtype) for t in (g.x, g.dy, g.weight, g.bias)
    )
    assert x is not None
    leaves = {"dx": x, "dweight": weight, "dbias": bias}
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_()
    y = function(x, tuple(g.shape), weight, bias, EPS)
    y.backward(dy)
    return {"y": y.detach(), **{n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}}


def scales(g: Given) -> Named:
    """The size of the terms that each element is a sum of, in fp64, shaped as the results."""
    x, dy = g.x.double(), g.dy.double()
    inner = list(range(-g.dims, 0))
    gamma = 1.0 if g.weight is None else g.weight.double()
    beta = 0.0 if g.bias is None else g.bias.double().abs()
    variance, mean = torch.var_mean(x, inner, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + EPS)
    xhat, gdy = (x - mean) * rstd, dy * gamma
    deviation = variance.sqrt() * rstd  # what the mean is known to, even where it is 0
    spread = mean.abs() * rstd + deviation

    def average(t: Tensor) -> Tensor:
        return t.mean(inner, keepdim=True)

    terms = gdy.abs() + average(gdy.abs()) + xhat.abs() * average((gdy * xhat).abs())
    moved = spread * (average(gdy * xhat).abs() + xhat.abs() * average(gdy).abs())
    rows = prod(g.x.shape[: -g.dims])
    dweight = (dy.abs() * (xhat.abs() + spread)).reshape(rows, *g.shape).sum(0)
    return {
        "y": (torch.as_tensor(gamma).abs() * (xhat.abs() + deviation) + beta).expand(g.x.shape),
        "dx": rstd * (terms + moved),
        "dweight": dweight,
        "dbias": dy.abs().reshape(rows, *g.shape).sum(0),
    }


def _moved(g: Given) -> Given:
    """The same case with each row's first value taken away, which changes no result, and keeps fp64's own
    digits at a large mean."""
    x = g.x.double().flatten(-g.dims)
    return replace(g, x=(x - x[..., :1]).view(g.x.shape))


def check(g: Given, ours: Named, beside_torch: bool = True) -> None:
    """Asserts that all results are good enough."""
    exact, scale = run(F.layer_norm, _moved(g), torch.float64), scales(g)
    assert ours.keys() == exact.keys()
    unit = torch.finfo(g.accumulator).eps
    theirs = run(_torch, g) if beside_torch else None
    for name, value in exact.items():
        result, size = ours[name], scale[name]
        error = (result.double() - value).abs()
        own = torch.finfo(result.dtype)
        allowed = 0.5 * own.eps * value.abs() + FEW * unit * size + own.smallest_normal * own.eps
        worst = (error / allowed).nan_to_num(nan=float("inf")).max()
        assert worst <= 1, f"{name}: {worst:.2f} times the bound"
        if theirs is not None:
            other = _rms(theirs[name].double() - value)
            limit = 2 * other + FEW * own.eps * _rms(size)
            assert _rms(error) <= limit, f"{name}: RMS error {_rms(error):.1e}, torch's {other:.1e}"


def _torch(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """torch's own, where the dtypes differ in fp32, with a result in x's."""
    if all(t is None or t.dtype == x.dtype for t in (weight, bias)):
        return F.layer_norm(x, shape, weight, bias, eps)
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), shape, weight, bias, eps).to(x.dtype)


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()
