"""GroupNorm in plain torch, any dtype: the oracle of the tests and the way to higher derivatives.

x, dy: [N, C, *], parameters [C]. A group is C / groups channels of a sample. InstanceNorm has as many
groups as channels. Half precision computes in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from .batchnorm import affine, by_channel, reduced_dims, wide


def in_groups(t: Tensor, groups: int) -> Tensor:
    """[N, C, *] -> [N, groups, C / groups, *]: a view in any memory format, so that results keep x's. Not
    `unflatten`, which autograd's own vmap (is_grads_batched) has no rule for."""
    return t.view(t.shape[0], groups, t.shape[1] // groups, *t.shape[2:])


def normalized(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(xhat [N, groups, C / groups, *], rstd [N, groups, 1 ...]) (Wu and He 2018, eq. 1 and 2), wide."""
    grouped = in_groups(wide(x), groups)
    variance, mean = torch.var_mean(grouped, list(range(2, grouped.dim())), correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return (grouped - mean) * rstd, rstd


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """y = gamma * xhat + beta, wide, in x's memory format."""
    xhat, _ = normalized(x, groups, eps)
    return affine(xhat.reshape(x.shape), weight, bias)


def group_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), differentiable in dy, x and weight."""
    xhat, rstd = normalized(x, groups, eps)
    group_dims, dims = list(range(2, xhat.dim())), reduced_dims(x)
    dy = wide(dy)
    dbias, dweight = dy.sum(dims), (dy * xhat.reshape(x.shape)).sum(dims)
    g = in_groups(dy if weight is None else dy * by_channel(wide(weight), x), groups)
    dx = rstd * (g - g.mean(group_dims, True) - xhat * (g * xhat).mean(group_dims, True))
    return dx.reshape(x.shape).to(x.dtype), dweight, dbias
