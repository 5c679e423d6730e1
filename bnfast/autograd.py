"""Autograd around the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import ops, reference
from .dispatch import eager
from .kernels import batch_norm as kernels


class BatchNorm(torch.autograd.Function):
    """Saves x, gamma and the coefficient table: nothing that a later step changes. The running buffers are not among them, so
    a training step between an eval forward and its backward leaves the gradient alone."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None,
        training: bool, cumulative: bool, momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        y, table = run(
            x, weight, bias, running_mean, running_var, batches, training, cumulative, momentum, eps, keep=True
        )  # fmt: skip
        ctx.save_for_backward(x, weight, table)
        ctx.training, ctx.eps = training, eps
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> Any:
        (dy,) = grads
        if dy is None:
            return (None,) * 10
        x, weight, table = ctx.saved_tensors  # type: ignore[attr-defined]
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        weight_dtype = ctx.weight_dtype if need_dweight else None  # type: ignore[attr-defined]
        bias_dtype = ctx.bias_dtype if need_dbias else None  # type: ignore[attr-defined]
        training, eps = ctx.training, ctx.eps  # type: ignore[attr-defined]
        if torch.is_grad_enabled():  # create_graph=True: something will differentiate this
            fixed = None if training else (table[0], table[3])
            dx, dweight, dbias = reference.batch_norm_backward(dy, x, weight, eps, fixed)
            return (
                dx if need_dx else None,
                dweight.to(weight_dtype) if need_dweight else None,
                dbias.to(bias_dtype) if need_dbias else None,
                *(None,) * 7,
            )
        backward = kernels.backward if eager(x) and eager(dy) else ops.backward
        dx, dweight, dbias = backward(x, dy, table, training, need_dx, weight_dtype, bias_dtype)
        return (
            dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, *(None,) * 7
        )  # fmt: skip


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None,
    training: bool, cumulative: bool, momentum: float, eps: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward, without autograd: (y, coefficient table)."""
    direct = eager(x)
    if training:
        train = kernels.forward if direct else ops.train
        return train(x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps)
    evaluate = kernels.inference if direct else ops.evaluate
    return evaluate(x, weight, bias, running_mean, running_var, eps, keep)
