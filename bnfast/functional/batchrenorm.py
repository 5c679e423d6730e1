"""Batch Renormalization, with the arguments of batch_norm and two limits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions, Renorm
from ..ops import batch_norm as ops
from ..ops.op import Call


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
    activation = None if activation is None else Activation.of(activation)
    options = BatchNormOptions(training, momentum, eps, Renorm(float(r_max), float(d_max)))
    buffers = (running_mean, running_var, None)
    return ops.batch_renorm(Call(input, weight, bias, residual, activation, options, buffers))
