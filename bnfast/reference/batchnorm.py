"""BatchNorm in plain torch. x, dy: [N, C, *], parameters and statistics [C]. stats: what the kernels' forward
returns. Half precision computes in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.records import BatchNormOptions


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


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * by_channel(wide(weight), y)
    return y if bias is None else y + by_channel(wide(bias), y)


def _correction(stats: Tensor) -> tuple[Tensor, Tensor] | None:
    """Batch Renormalization's r and d, which carry no gradient."""
    return (stats[4], stats[5]) if stats.shape[0] == 6 else None


def _standardized(x: Tensor, stats: Tensor, options: BatchNormOptions) -> tuple[Tensor, Tensor]:
    """(xhat, rstd), of the batch's statistics or of those that are given."""
    if options.training:
        mean, variance = moments(x)
        rstd = torch.rsqrt(variance + options.eps)
    else:
        mean, rstd = stats[0], stats[3]
    return (wide(x) - by_channel(mean, x)) * by_channel(rstd, x), rstd


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, options: BatchNormOptions
) -> Tensor:
    """y = gamma * xhat + beta (Ioffe and Szegedy 2015, algorithm 1), wide."""
    y, _ = _standardized(x, stats, options)
    correction = _correction(stats)
    if correction is not None:
        y = y * by_channel(correction[0], x) + by_channel(correction[1], x)
    return affine(y, weight, bias)


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: BatchNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), differentiable in dy, x and weight."""
    g, dims = wide(dy), reduced_dims(x)
    xhat, rstd = _standardized(x, stats, options)
    dbias, dweight = g.sum(dims), (g * xhat).sum(dims)
    dx = g
    if options.training:
        n = x.numel() / x.shape[1]
        dx = g - by_channel(dbias / n, x) - xhat * by_channel(dweight / n, x)
    scale = rstd if weight is None else rstd * wide(weight)
    correction = _correction(stats)
    if correction is not None:
        r, d = correction
        scale, dweight = scale * r, r * dweight + d * dbias
    return (dx * by_channel(scale, x)).to(x.dtype), dweight, dbias
