"""Autograd around BatchNorm's kernels, which are Batch Renormalization's too."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import KERNELS
from ..kernels import batch_norm as kernels
from ..kernels.epilogue import Activation, Epilogue
from ..ops import batchnorm as ops
from ..reference import batchnorm as reference
from ..reference.batchrenorm import Limits
from . import shared

Buffers = tuple[Tensor | None, Tensor | None, Tensor | None]  # running mean and variance, batch counter
# dispatch.path's answer, activation, training, cumulative, momentum, eps, Batch Renormalization's limits and
# guard
Options = tuple[int, Activation | None, bool, bool, float, float, tuple[Limits, bool] | None, Buffers]


class BatchNorm(torch.autograd.Function):
    """Saves the coefficient table, and nothing that a later step changes: the running buffers are not among
    it, so a training step between an eval forward and its backward leaves the gradient alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        options: Options,
    ) -> Tensor:  # fmt: skip
        y, table, signs = run(x, weight, bias, residual, options, True)
        shared.save(ctx, x, weight, bias, residual, table, signs, options[1], (options[2], options[5]))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*shared.gradients(ctx, grads[0], _direct, _operator, _plain, _normalized), None)


def _direct(
    x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, need_dx: bool,
    weight_dtype: Any, bias_dtype: Any, bias: Tensor | None, epilogue: Epilogue,
) -> Any:  # fmt: skip
    """gamma and beta are in the table."""
    return kernels.backward(x, dy, table, fixed[0], need_dx, weight_dtype, bias_dtype, False, epilogue)


def _operator(
    x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, need_dx: bool,
    weight_dtype: Any, bias_dtype: Any, bias: Tensor | None, epilogue: Epilogue,
) -> Any:  # fmt: skip
    return ops.backward(
        x, dy, table, fixed[0], need_dx, weight_dtype, bias_dtype, *epilogue.activation, epilogue.residual
    )


def _statistics(table: Tensor, fixed: Any) -> tuple[Any, Any, float]:
    """What the reference asks for: given mean and rstd, or None in training; r and d, or None; eps."""
    training, eps = fixed
    correction = (table[4], table[5]) if table.shape[0] == 6 else None
    return None if training else (table[0], table[3]), correction, eps


def _plain(dy: Tensor, x: Tensor, weight: Tensor | None, table: Tensor, fixed: Any) -> Any:
    statistics, correction, eps = _statistics(table, fixed)
    return reference.batch_norm_backward(dy, x, weight, eps, statistics, correction)


def _normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, table: Tensor, fixed: Any) -> Tensor:
    statistics, correction, eps = _statistics(table, fixed)
    return reference.normalized(x, weight, bias, eps, statistics, correction)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: Options,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The forward, without autograd: (y, coefficient table, signs)."""
    way, activation, training, cumulative, momentum, eps, renorm, buffers = options
    epilogue = shared.epilogue(activation, residual, keep)
    if way == KERNELS:
        if training:
            made = kernels.forward(
                x, weight, bias, *buffers, cumulative, momentum, eps, False, renorm, epilogue
            )
            if not torch.is_inference_mode_enabled():  # whoever has saved them is to know
                torch._C._increment_version([t for t in buffers if t is not None])
            return made
        return kernels.inference(x, weight, bias, buffers[0], buffers[1], eps, keep, epilogue)
    if not training:
        return shared.checked(
            ops.evaluate(x, weight, bias, buffers[0], buffers[1], eps, keep, *shared.flat(epilogue))
        )
    if renorm is not None:
        made = ops.train_renorm(
            x, weight, bias, *buffers, cumulative, momentum, eps, *renorm, *shared.flat(epilogue)
        )
    else:
        made = ops.train(x, weight, bias, *buffers, cumulative, momentum, eps, *shared.flat(epilogue))
    return shared.checked(made)


normalize = partial(shared.normalize, BatchNorm, shared.without_functorch(BatchNorm), run)
