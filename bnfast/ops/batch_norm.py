"""BatchNorm and Batch Renormalization for op.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import KERNELS, TRITON
from ..kernels.layouts import format_in_batch_norm, ordered, ordered_like
from ..kernels.records import BatchNormOptions, Buffers, Forward, Renorm
from ..reference import batchnorm as reference
from ..reference.batchrenorm import refuse_recomputation
from . import op
from .arguments import vectors_fit
from .op import NO_KERNELS, Call, Kernels, Norm
from .operators import Layout, Packing, backward_operator, forward_operator
from .torch_batch_norm import torch_batch_norm, verify_batch_size

_FLOAT_OR_NONE = (float, type(None))


def batch_norm(call: Call) -> Tensor:
    """Checks the options of a call, BatchNormOptions, and runs it."""
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
    """batch_norm with a Renorm among the options. momentum None collects statistics: r = 1, d = 0 and the
    cumulative average, in which no channel is skipped for not being finite, because it would need a count of
    its own."""
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
    """Floats of the integers and 0-d tensors that F.batch_norm accepts for floats, or its TypeError."""
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


def _statistics(stats: Tensor, options: BatchNormOptions) -> tuple[Any, Any]:
    """What the reference asks for: given mean and rstd, or None in training; r and d, or None."""
    correction = (stats[4], stats[5]) if stats.shape[0] == 6 else None
    return None if options.training else (stats[0], stats[3]), correction


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, options: BatchNormOptions
) -> Tensor:
    return reference.normalized(x, weight, bias, options.eps, *_statistics(stats, options))


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: BatchNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.batch_norm_backward(dy, x, weight, options.eps, *_statistics(stats, options))


class BatchNorm(torch.autograd.Function):
    """Saves stats, but no running statistics: a training step between an eval forward and its backward does
    not change the gradient."""

    forward = staticmethod(op.record)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return op.gradients(ctx, grads[0], NORM)


_kernels = NO_KERNELS
if TRITON:
    from ..kernels import batch_norm as kernels

    _layout = Layout(_ordered, lambda x: ordered_like(x, format_in_batch_norm))
    _BUFFERS = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches"
    _OPTIONS = "bool cumulative, float momentum, float eps"

    def _unpack(options: BatchNormOptions) -> tuple[Any, ...]:
        return options.momentum is None, options.momentum or 0.0, options.eps

    def _pack(
        x: Tensor, cumulative: bool, momentum: float, eps: float, limits: Any = None, guarded: bool = True
    ) -> BatchNormOptions:
        renorm = None if limits is None else Renorm(*limits)._replace(guarded=guarded)
        return BatchNormOptions(True, None if cumulative else momentum, eps, renorm)

    def _renorm_forward(*given: Any) -> Forward:
        refuse_recomputation()
        return kernels.forward(*given)

    _train = forward_operator(
        "batch_norm_train",
        kernels.forward,
        _layout,
        Packing(_OPTIONS, _pack, _unpack),
        lambda x, options, keep: (4, x.shape[1]),
        _BUFFERS,
    )
    _train_renorm = forward_operator(
        "batch_renorm_train",
        _renorm_forward,
        _layout,
        Packing(
            f"{_OPTIONS}, float[] limits, bool guarded",
            _pack,
            lambda options: (*_unpack(options), list(options.renorm[:5]), options.renorm.guarded),
        ),
        lambda x, options, keep: (6, x.shape[1]),
        _BUFFERS,
    )
    _eval = forward_operator(
        "batch_norm_eval",
        kernels.forward,
        _layout,
        Packing(
            "float eps", lambda x, eps: BatchNormOptions(False, 0.0, eps), lambda options: (options.eps,)
        ),
        lambda x, options, keep: (4, x.shape[1]) if keep else (0,),
        "Tensor running_mean, Tensor running_var",
    )

    def _operator(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, options: BatchNormOptions,
        *rest: Any,
    ) -> Forward:  # fmt: skip
        operator = _eval if not options.training else _train if options.renorm is None else _train_renorm
        return operator(x, weight, bias, buffers, options, *rest)

    _kernels = Kernels(
        kernels.forward,
        kernels.backward,
        _operator,
        backward_operator(
            "batch_norm_backward",
            kernels.backward,
            _layout,
            Packing("bool training", lambda x, t: BatchNormOptions(t, 0.0, 0.0), lambda o: (o.training,)),
        ),
    )


def _written(call: Call, route: int) -> None:
    """Tells autograd that the kernels have written to the buffers, which others may have saved for a
    backward. Operators do so themselves."""
    if route == KERNELS and call.options.training and not torch.is_inference_mode_enabled():
        torch._C._increment_version([t for t in call.buffers if t is not None])


NORM = Norm(
    supports, _ordered, torch_batch_norm, _kernels, _reference, _reference_backward, BatchNorm, _written
)
