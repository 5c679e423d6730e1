"""LayerNorm in plain torch, any dtype: the oracle of the tests and the path to higher derivatives.

x, dy: normalized over their last `dims` dimensions, parameters of the shape of these. Half precision computes
in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batchnorm import wide


def normalized(x: Tensor, dims: int, eps: float) -> tuple[Tensor, Tensor]:
    """(xhat, rstd) (Ba, Kiros and Hinton 2016, eq. 3), wide. rstd keeps the normalized dimensions, as 1s."""
    inner = list(range(-dims, 0))
    variance, mean = torch.var_mean(wide(x), inner, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return (wide(x) - mean) * rstd, rstd


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float) -> Tensor:
    """y = gamma * xhat + beta, wide."""
    y, _ = normalized(x, dims, eps)
    if weight is not None:
        y = y * wide(weight)
    return y if bias is None else y + wide(bias)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), differentiable in dy, x and weight."""
    inner, outer = list(range(-dims, 0)), list(range(x.dim() - dims))
    xhat, rstd = normalized(x, dims, eps)
    dy = wide(dy)
    # summing over no dimensions at all would sum over every one of them
    dbias = dy.sum(outer) if outer else dy
    dweight = (dy * xhat).sum(outer) if outer else dy * xhat
    g = dy if weight is None else dy * wide(weight)
    dx = rstd * (g - g.mean(inner, True) - xhat * (g * xhat).mean(inner, True))
    return dx.to(x.dtype), dweight, dbias
