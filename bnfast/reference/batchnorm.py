"""The same maths in plain torch, any dtype: the oracle of the tests and the path to higher derivatives.

Shapes: x, dy [N, C, *], parameters and statistics [C]. Half precision computes in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the type that statistics are kept in."""
    return x if x.dtype == torch.float64 else x.float()


def reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def by_channel(v: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1 ...], to go with x."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of each channel."""
    variance, mean = torch.var_mean(wide(x), reduced_dims(x), correction=0)
    return mean, variance


def normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    fixed: tuple[Tensor, Tensor] | None,
    correction: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y = gamma * xhat + beta (Ioffe and Szegedy 2015, algorithm 1), wide. fixed, correction: as below."""
    xhat, _ = _standardized(x, eps, fixed)
    if correction is not None:
        xhat = xhat * by_channel(correction[0], x) + by_channel(correction[1], x)
    return affine(xhat, weight, bias)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * by_channel(wide(weight), y)
    return y if bias is None else y + by_channel(wide(bias), y)


def _standardized(x: Tensor, eps: float, fixed: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """(xhat, rstd)."""
    if fixed is None:
        mean, variance = moments(x)
        rstd = torch.rsqrt(variance + eps)
    else:
        mean, rstd = fixed
    return (wide(x) - by_channel(mean, x)) * by_channel(rstd, x), rstd


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    fixed: tuple[Tensor, Tensor] | None,
    correction: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), differentiable in dy, x and weight.

    fixed: (mean, rstd) that do not depend on x, as in eval; None in training. correction: Batch
    Renormalization's r and d, which carry no gradient.
    """
    g, dims = wide(dy), reduced_dims(x)
    xhat, rstd = _standardized(x, eps, fixed)
    dbias, dweight = g.sum(dims), (g * xhat).sum(dims)
    dx = g
    if fixed is None:
        n = x.numel() / x.shape[1]
        dx = g - by_channel(dbias / n, x) - xhat * by_channel(dweight / n, x)
    scale = rstd if weight is None else rstd * wide(weight)
    if correction is not None:
        r, d = correction
        scale, dweight = scale * r, r * dweight + d * dbias
    return (dx * by_channel(scale, x)).to(x.dtype), dweight, dbias
