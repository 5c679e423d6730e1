"""Batch Renormalization, with the arguments of batch_norm and two limits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..kernels.epilogue import Activation, ActivationLike
from ..reference.batchrenorm import Limits, refuse_recomputation
from .batchnorm import counting_batch_norm


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-5,
    r_max: float = 3.0,
    d_max: float = 5.0,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch Renormalization (Ioffe 2017, arXiv 1702.03275, algorithm 1).

    input: [N, C, *], as for batch_norm; running_mean, running_var: [C], required; weight, bias: [C] or None.
    In training y = gamma * ((x - mean) / sigma * r + d) + beta, with r = sigma / running sigma clipped to
    [1 / r_max, r_max] and d = (mean - running mean) / running sigma clipped to [-d_max, d_max]. r and d come
    from the running statistics before this batch and carry no gradient; r_max=1, d_max=0 is batch_norm.
    Then the running statistics move in place: running_mean by `momentum` towards the batch's mean, and
    running_var so that its sigma, sqrt(running_var + eps), moves by `momentum` towards the batch's. In eval
    it is batch_norm. activation, residual: as batch_norm's.

    Returns a tensor of input's shape, dtype and memory format. Raises as batch_norm does, and ValueError for
    missing running statistics, r_max < 1 and d_max < 0, before anything is updated; RuntimeError in the
    recomputation of activation checkpointing (see BatchRenorm2d)."""
    if (
        has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
        and not torch.compiler.is_compiling()
    ):
        return handle_torch_function(
            batch_renorm, (input, running_mean, running_var, weight, bias, residual), input, running_mean,
            running_var, weight=weight, bias=bias, training=training, momentum=momentum, eps=eps, r_max=r_max,
            d_max=d_max, activation=activation, residual=residual,
        )  # fmt: skip
    if momentum is None:
        raise TypeError("batch_renorm(): argument 'momentum' must be float, not NoneType")
    limits = (float(r_max), float(d_max), 0.0, 0.0, 0.0)
    return scheduled_batch_renorm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, limits, True, None,
        None if activation is None else Activation.of(activation), residual,
    )  # fmt: skip


def scheduled_batch_renorm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    limits: Limits,
    guarded: bool,
    batches: Tensor | None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """batch_renorm with limits that grow with the number of batches so far, read on the device. momentum None
    collects statistics: r = 1, d = 0, cumulative average. guarded: channels of a batch that are not finite
    leave their running statistics alone; not so while statistics are collected, where a channel would need a
    count of its own."""
    if not limits[0] >= 1:
        raise ValueError(f"batch_renorm r_max must be at least 1, but got {limits[0]}")
    if not limits[1] >= 0:
        raise ValueError(f"batch_renorm d_max must be at least 0, but got {limits[1]}")
    if not training:
        return counting_batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum or 0.0, eps, None, None,
            activation, residual,
        )  # fmt: skip
    if running_mean is None or running_var is None:
        raise ValueError("batch_renorm needs running_mean and running_var: it corrects towards them")
    if not torch.compiler.is_compiling():
        refuse_recomputation()
    return counting_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, batches,
        (limits, guarded and momentum is not None),
        activation, residual,
    )  # fmt: skip
