"""GroupNorm and LayerNorm in plain torch. Half precision computes in fp32. Their statistics are computed from
x again, because derivatives have to go through them: `stats` is not read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.records import GroupNormOptions, LayerNormOptions
from .batchnorm import affine, by_channel, reduced_dims, wide


def _standardized(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """(xhat, rstd) of values that lie along these dimensions, which rstd keeps as 1s; wide."""
    variance, mean = torch.var_mean(wide(x), dims, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return (wide(x) - mean) * rstd, rstd


def _dx(g: Tensor, xhat: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    """The gradient of x, from g = dy * gamma."""
    return rstd * (g - g.mean(dims, True) - xhat * (g * xhat).mean(dims, True))


def _in_groups(t: Tensor, groups: int) -> Tensor:
    """[N, C, *] -> [N, groups, C / groups, *]: a view in any memory format, so that results keep x's. Not
    `unflatten`, which autograd's own vmap (is_grads_batched) has no rule for."""
    return t.view(t.shape[0], groups, t.shape[1] // groups, *t.shape[2:])


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, options: GroupNormOptions
) -> Tensor:
    """y = gamma * xhat + beta (Wu and He 2018, eq. 1 and 2) of x [N, C, *], wide, in x's memory format."""
    xhat, _ = _standardized(_in_groups(wide(x), options.groups), list(range(2, x.dim() + 1)), options.eps)
    return affine(xhat.reshape(x.shape), weight, bias)


def group_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: GroupNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), differentiable in dy, x and weight."""
    inner, outer = list(range(2, x.dim() + 1)), reduced_dims(x)
    xhat, rstd = _standardized(_in_groups(wide(x), options.groups), inner, options.eps)
    dy = wide(dy)
    dbias, dweight = dy.sum(outer), (dy * xhat.reshape(x.shape)).sum(outer)
    g = _in_groups(dy if weight is None else dy * by_channel(wide(weight), x), options.groups)
    return _dx(g, xhat, rstd, inner).reshape(x.shape).to(x.dtype), dweight, dbias


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, options: LayerNormOptions
) -> Tensor:
    """y = gamma * xhat + beta (Ba, Kiros and Hinton 2016, eq. 3), wide."""
    y, _ = _standardized(x, list(range(-len(options.shape), 0)), options.eps)
    if weight is not None:
        y = y * wide(weight)
    return y if bias is None else y + wide(bias)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: LayerNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), differentiable in dy, x and weight."""
    dims = len(options.shape)
    inner, outer = list(range(-dims, 0)), list(range(x.dim() - dims))
    xhat, rstd = _standardized(x, inner, options.eps)
    dy = wide(dy)
    # summing over no dimensions at all would sum over every one of them
    dbias = dy.sum(outer) if outer else dy
    dweight = (dy * xhat).sum(outer) if outer else dy * xhat
    g = dy if weight is None else dy * wide(weight)
    return _dx(g, xhat, rstd, inner).to(x.dtype), dweight, dbias
