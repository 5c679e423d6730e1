"""Autograd around BatchNorm's kernels, which are Batch Renormalization's too."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import KERNELS
from ..kernels import batch_norm as kernels
from ..ops import batchnorm as ops
from ..reference import batchnorm as reference
from ..reference.batchrenorm import Limits
from . import shared

Buffers = tuple[Tensor | None, Tensor | None, Tensor | None]  # running mean and variance, batch counter
# dispatch.path's answer, training, cumulative, momentum, eps, Batch Renormalization's limits and guard
Options = tuple[int, bool, bool, float, float, tuple[Limits, bool] | None, Buffers]


class BatchNorm(torch.autograd.Function):
    """Saves x, gamma and the coefficient table: nothing that a later step changes. The running buffers are
    not among them, so a training step between an eval forward and its backward leaves the gradient
    alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
        y, table = run(x, weight, bias, options, True)
        ctx.save_for_backward(x, weight, table)
        ctx.fixed = ((options[1], options[4]), None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*shared.gradients(ctx, grads[0], _direct, _operator, _plain), None)


def _direct(x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, *wanted: Any) -> Any:
    return kernels.backward(x, dy, table, fixed[0], *wanted)  # gamma is in the table


def _operator(x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, *wanted: Any) -> Any:
    return ops.backward(x, dy, table, fixed[0], *wanted)


def _plain(dy: Tensor, x: Tensor, weight: Tensor | None, table: Tensor, fixed: Any) -> Any:
    training, eps = fixed
    statistics = None if training else (table[0], table[3])
    correction = (table[4], table[5]) if table.shape[0] == 6 else None
    return reference.batch_norm_backward(dy, x, weight, eps, statistics, correction)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor]:
    """The forward, without autograd: (y, coefficient table)."""
    way, training, cumulative, momentum, eps, renorm, buffers = options
    if training:
        if way == KERNELS:
            return kernels.forward(x, weight, bias, *buffers, cumulative, momentum, eps, False, renorm)
        if renorm is not None:
            return ops.train_renorm(x, weight, bias, *buffers, cumulative, momentum, eps, *renorm)
        return ops.train(x, weight, bias, *buffers, cumulative, momentum, eps)
    evaluate = kernels.inference if way == KERNELS else ops.evaluate
    return evaluate(x, weight, bias, buffers[0], buffers[1], eps, keep)


normalize = partial(shared.normalize, BatchNorm, shared.without_functorch(BatchNorm), run)
