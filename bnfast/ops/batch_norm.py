"""BatchNorm and Batch Renormalization on the road of op.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import KERNELS, TRITON
from ..kernels.layouts import format_in_batch_norm, ordered
from ..kernels.records import BatchNormOptions
from ..reference import batchnorm as reference
from ..reference.batchrenorm import refuse_recomputation
from . import op
from .arguments import vectors_fit
from .op import NO_KERNELS, Call, Norm
from .torch_batch_norm import torch_batch_norm, verify_batch_size

_FLOAT_OR_NONE = (float, type(None))


def batch_norm(call: Call) -> Tensor:
    """A call with BatchNormOptions, checked."""
    training, momentum, eps, _ = call.options
    if type(training) is not bool or type(momentum) not in _FLOAT_OR_NONE or type(eps) is not float:
        training, momentum, eps = _as_torch_takes_them(training, momentum, eps)
        options = call.options._replace(training=training, momentum=momentum, eps=eps)
        call = call._replace(options=options)
    if eps <= 0.0 and (training or eps < 0.0):  # torch has raised these since 2.13
        needed = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {needed}, but got {eps}")
    return op.run(call, NORM)


def batch_renorm(call: Call) -> Tensor:
    """A call whose options have a Renorm, with limits that grow with the number of batches so far, read on
    the device. momentum None collects statistics: r = 1, d = 0, cumulative average, and then no channel is
    skipped for not being finite: it would need a count of its own."""
    training, momentum, eps, renorm = call.options
    if not renorm.r_max >= 1:
        raise ValueError(f"batch_renorm r_max must be at least 1, but got {renorm.r_max}")
    if not renorm.d_max >= 0:
        raise ValueError(f"batch_renorm d_max must be at least 0, but got {renorm.d_max}")
    if not training:
        return batch_norm(call._replace(options=BatchNormOptions(False, momentum or 0.0, eps)))
    if call.buffers[0] is None or call.buffers[1] is None:
        raise ValueError("batch_renorm needs running_mean and running_var: it corrects towards them")
    if not torch.compiler.is_compiling():
        refuse_recomputation()
    if momentum is None:
        call = call._replace(options=call.options._replace(renorm=renorm._replace(guarded=False)))
    return batch_norm(call)


def _as_torch_takes_them(training: Any, momentum: Any, eps: Any) -> tuple[bool, float | None, float]:
    """Integers and 0-d tensors, which torch.nn.functional.batch_norm takes for floats, or its TypeError."""
    x = torch.ones(2, 1)
    F.batch_norm(x, x[0], x[1], None, None, training, 0.0 if momentum is None else momentum, eps)
    return training, None if momentum is None else float(momentum), float(eps)


def supports(route: int, call: Call) -> bool:
    x, weight, bias, _, _, (training, _, _, _), (mean, variance, batches) = call
    if not 2 <= x.dim() <= 5 or (not training and (mean is None or variance is None)):
        return False
    if not vectors_fit(route, x, mean, variance, weight, bias):
        return False
    if mean is not None and variance is not None:
        if (mean.requires_grad or variance.requires_grad) and torch.is_grad_enabled():
            return False
        # inference tensors are updated in inference mode only
        inference = training and route == KERNELS and (mean.is_inference() or variance.is_inference())
        if inference and not torch.is_inference_mode_enabled():
            return False
    elif mean is not None or variance is not None:
        return False
    if batches is not None and (
        batches.device != x.device or batches.dtype != torch.int64 or batches.numel() != 1
    ):
        return False
    if training and x.size(0) == 1:
        verify_batch_size(x.size())
    return True


def _ordered(x: Tensor) -> Tensor:
    return ordered(x, format_in_batch_norm)


def _statistics(table: Tensor, options: BatchNormOptions) -> tuple[Any, Any]:
    """What the reference asks for: given mean and rstd, or None in training; r and d, or None."""
    correction = (table[4], table[5]) if table.shape[0] == 6 else None
    return None if options.training else (table[0], table[3]), correction


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, table: Tensor, options: BatchNormOptions
) -> Tensor:
    return reference.normalized(x, weight, bias, options.eps, *_statistics(table, options))


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, table: Tensor, options: BatchNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.batch_norm_backward(dy, x, weight, options.eps, *_statistics(table, options))


class BatchNorm(torch.autograd.Function):
    """Saves the coefficient table, and nothing that a later step changes: the running buffers are not among
    it, so a training step between an eval forward and its backward leaves the gradient alone."""

    forward = staticmethod(op.record)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return op.gradients(ctx, grads[0], NORM)


_kernels = NO_KERNELS
if TRITON:
    from . import batch_norm_operators

    _kernels = batch_norm_operators.KERNELS


def _written(call: Call, route: int) -> None:
    """Whoever has saved the buffers for a backward is to know that the kernels have written to them.
    Operators say so themselves."""
    if route == KERNELS and call.options.training and not torch.is_inference_mode_enabled():
        torch._C._increment_version([t for t in call.buffers if t is not None])


NORM = Norm(
    supports, _ordered, torch_batch_norm, _kernels, _reference, _reference_backward, BatchNorm, _written
)
