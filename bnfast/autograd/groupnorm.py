"""Autograd around GroupNorm's kernels, which are InstanceNorm's too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..dispatch import KERNELS, batched, watched
from ..kernels import group_norm as kernels
from ..kernels.plan import TooLarge
from ..ops import groupnorm as ops
from ..reference import groupnorm as reference

Options = tuple[int, int, float]  # dispatch.path's answer, number of groups, eps


class GroupNorm(torch.autograd.Function):
    """Saves x, gamma, and mean and rstd of each group of each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
        _, groups, eps = options
        y, table = run(x, weight, bias, options)
        ctx.save_for_backward(x, weight, table)
        ctx.fixed = (groups, eps, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> Any:
        (dy,) = grads
        x, weight, table = ctx.saved_tensors  # type: ignore[attr-defined]
        groups, eps, bias_dtype = ctx.fixed  # type: ignore[attr-defined]
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        weight_dtype = weight.dtype if need_dweight else None
        bias_dtype = bias_dtype if need_dbias else None
        gradients = None
        if not (torch.is_grad_enabled() or batched(dy)):  # create_graph=True, or a vmap over the backward
            sweep = ops.backward if watched(x) or type(dy) is not Tensor else _backward
            gradients = sweep(x, dy, table, weight, groups, need_dx, weight_dtype, bias_dtype)
        if gradients is None:
            dx, dweight, dbias = reference.group_norm_backward(dy, x, weight, groups, eps)
            gradients = (dx, dweight.to(weight_dtype or dx.dtype), dbias.to(bias_dtype or dx.dtype))
        needed = zip((need_dx, need_dweight, need_dbias), gradients, strict=True)
        return (*(gradient if need else None for need, gradient in needed), None)


def _backward(*arguments: Any) -> Any:
    """The kernels' backward, or None where dy is too much for them (huge, and without whole vectors)."""
    try:
        return kernels.backward(*arguments)
    except TooLarge:
        return None


_apply = super(torch.autograd.Function, GroupNorm).apply


def apply(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    """GroupNorm.apply; as with BatchNorm, without what dispatch has ruled out where kernels run directly."""
    if options[0] == KERNELS:
        return _apply(x, weight, bias, options)
    return GroupNorm.apply(x, weight, bias, options)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward, without autograd: (y, table of mean and rstd)."""
    way, groups, eps = options
    return (kernels.forward if way == KERNELS else ops.forward)(x, groups, weight, bias, eps)
