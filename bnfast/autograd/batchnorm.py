"""Autograd around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..dispatch import KERNELS, batched, watched
from ..kernels import batch_norm as kernels
from ..kernels.plan import TooLarge
from ..ops import batchnorm as ops
from ..reference import batchnorm as reference
from ..reference.batchrenorm import Limits

Buffers = tuple[Tensor | None, Tensor | None, Tensor | None]  # running mean and variance, batch counter
# dispatch.path's answer, training, cumulative, momentum, eps, Batch Renormalization's limits and guard
Options = tuple[int, bool, bool, float, float, tuple[Limits, bool] | None]


class BatchNorm(torch.autograd.Function):
    """Saves x, gamma and the coefficient table: nothing that a later step changes. The running buffers are
    not among them, so a training step between an eval forward and its backward leaves the gradient
    alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        buffers: Buffers,
        options: Options,
    ) -> Tensor:
        """buffers: running mean and variance, batch counter."""
        _, training, _, _, eps, _ = options
        y, table = run(x, weight, bias, buffers, options, True)
        ctx.save_for_backward(x, weight, table)
        ctx.fixed = (training, eps, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> Any:
        (dy,) = grads
        x, weight, table = ctx.saved_tensors  # type: ignore[attr-defined]
        training, eps, bias_dtype = ctx.fixed  # type: ignore[attr-defined]
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        weight_dtype = weight.dtype if need_dweight else None
        bias_dtype = bias_dtype if need_dbias else None
        gradients = None
        if not (torch.is_grad_enabled() or batched(dy)):  # create_graph=True, or a vmap over the backward
            sweep = ops.backward if watched(x) or type(dy) is not Tensor else _backward
            gradients = sweep(x, dy, table, training, need_dx, weight_dtype, bias_dtype)
        if gradients is None:
            fixed = None if training else (table[0], table[3])
            correction = (table[4], table[5]) if table.shape[0] == 6 else None
            dx, dweight, dbias = reference.batch_norm_backward(dy, x, weight, eps, fixed, correction)
            gradients = (dx, dweight.to(weight_dtype or dx.dtype), dbias.to(bias_dtype or dx.dtype))
        needed = zip((need_dx, need_dweight, need_dbias), gradients, strict=True)
        return (*(gradient if need else None for need, gradient in needed), None, None)


def _backward(*arguments: Any) -> Any:
    """The kernels' backward, or None where dy is too much for them (huge, and without whole vectors)."""
    try:
        return kernels.backward(*arguments)
    except TooLarge:
        return None


_apply = super(torch.autograd.Function, BatchNorm).apply


def apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, options: Options
) -> Tensor:
    """BatchNorm.apply. Where the kernels are called directly, without what Function.apply does for functorch,
    which dispatch has ruled out: 4 us of 40."""
    if options[0] == KERNELS:
        return _apply(x, weight, bias, buffers, options)
    return BatchNorm.apply(x, weight, bias, buffers, options)


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    buffers: Buffers,
    options: Options,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The forward, without autograd: (y, coefficient table)."""
    way, training, cumulative, momentum, eps, renorm = options
    if training:
        if way == KERNELS:
            return kernels.forward(x, weight, bias, *buffers, cumulative, momentum, eps, renorm=renorm)
        if renorm is not None:
            return ops.train_renorm(x, weight, bias, *buffers, cumulative, momentum, eps, *renorm)
        return ops.train(x, weight, bias, *buffers, cumulative, momentum, eps)
    evaluate = kernels.inference if way == KERNELS else ops.evaluate
    return evaluate(x, weight, bias, buffers[0], buffers[1], eps, keep)
