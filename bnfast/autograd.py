"""Autograd around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import ops, reference
from .dispatch import batched, eager
from .kernels import batch_norm as kernels


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
        buffers: tuple[Tensor | None, Tensor | None, Tensor | None],
        options: tuple[bool, bool, float, float],
    ) -> Tensor:
        """buffers: running mean and variance, batch counter. options: training, cumulative, momentum, eps."""
        training, _, _, eps = options
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
        if torch.is_grad_enabled() or batched(dy):  # create_graph=True, or a vmap over the backward
            fixed = None if training else (table[0], table[3])
            dx, dweight, dbias = reference.batch_norm_backward(dy, x, weight, eps, fixed)
            return (
                dx if need_dx else None,
                dweight.to(weight_dtype) if need_dweight else None,
                dbias.to(bias_dtype) if need_dbias else None,
                *(None,) * 2,
            )
        if eager(x) and type(dy) is Tensor:
            gradients = kernels.backward(
                x, kernels.dense_like(dy, x), table, training, need_dx, weight_dtype, bias_dtype
            )  # fmt: skip
        else:
            gradients = ops.backward(x, dy, table, training, need_dx, weight_dtype, bias_dtype)
        dx, dweight, dbias = gradients
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            *(None,) * 2,
        )


_apply = super(torch.autograd.Function, BatchNorm).apply


def apply(*arguments: Any) -> Tensor:
    """BatchNorm.apply. Eagerly without what Function.apply does for functorch, which dispatch has ruled out:
    4 us of 40."""
    return BatchNorm.apply(*arguments) if torch.compiler.is_compiling() else _apply(*arguments)


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    buffers: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: tuple[bool, bool, float, float],
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The forward, without autograd: (y, coefficient table)."""
    training, cumulative, momentum, eps = options
    if training:
        train = kernels.forward if eager(x) else ops.train
        return train(x, weight, bias, *buffers, cumulative, momentum, eps)
    evaluate = kernels.inference if eager(x) else ops.evaluate
    return evaluate(x, weight, bias, buffers[0], buffers[1], eps, keep)
