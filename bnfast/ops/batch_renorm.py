"""Batch Renormalization for op.py: BatchNorm with options that have a Renorm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions, Renorm
from ..reference.batchrenorm import refuse_recomputation
from .arguments import overridden
from .batch_norm import run_batch_norm
from .op import Call


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
    """Batch Renormalization, and act(normalized + residual) with it.

    In training y = activation(((x - mean) / sigma * r + d) * weight + bias + residual), with the batch's mean
    and sigma = sqrt(variance + eps), r = sigma / running sigma clipped to [1 / r_max, r_max], and d = (mean -
    running mean) / running sigma clipped to [-d_max, d_max]. r and d come from the running statistics before
    this batch and carry no gradient. With r_max=1 and d_max=0 it is batch_norm.

    The running statistics are then updated in place: running_mean moves by `momentum` towards the batch's
    mean, and running_var so that its sigma, sqrt(running_var + eps), moves by `momentum` towards the batch's.
    Without `training` it is batch_norm.

    Args:
        input (Tensor): What is normalized.
        running_mean (Tensor): [C], of any floating dtype. Required.
        running_var (Tensor): [C], of any floating dtype. Required.
        weight (Tensor, optional): The channels' scales, [C], of any floating dtype. Default: None, for 1.
        bias (Tensor, optional): The channels' shifts, [C], of any floating dtype. Default: None, for 0.
        training (bool): Whether to normalize with the batch's statistics, corrected. Default: False.
        momentum (float): The weight of the batch in the running statistics. Default: 0.01.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        r_max (float): The limit of r, at least 1. Default: 3.0.
        d_max (float): The limit of d, at least 0. Default: 5.0.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.
        residual (Tensor, optional): What is added to the normalized values before the activation, of input's
            shape, dtype and device, in any strides. Keyword only. Default: None.

    Shape:
        - input: (N, C, *), of fp16, bf16, fp32 or fp64, in any strides.
        - residual: as input.
        - output: as input, channels_last or channels_last_3d if input is, and contiguous otherwise.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        ValueError: As batch_norm, and for missing running statistics, r_max < 1 and d_max < 0. All before
            anything is updated.
        RuntimeError: As batch_norm, and in the recomputation of activation checkpointing (see
            bnfast.BatchRenorm2d).
        TypeError: As batch_norm, and for a momentum of None.

    Example:
        >>> x, mean, variance = torch.randn(8, 16, 4, 4), torch.zeros(16), torch.ones(16)
        >>> y = bnfast.functional.batch_renorm(x, mean, variance, training=True, r_max=1.0, d_max=0.0)
        >>> torch.allclose(y, F.batch_norm(x, None, None, training=True), atol=1e-5)
        True

    References:
        Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        arXiv 1702.03275, algorithm 1.
    """
    if (
        has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
        and not torch.compiler.is_compiling()
    ):
        return overridden(batch_renorm, locals(), 3)
    if momentum is None:
        raise TypeError("batch_renorm(): argument 'momentum' must be float, not NoneType")
    activation = None if activation is None else Activation.of(activation)
    options = BatchNormOptions(training, momentum, eps, Renorm(float(r_max), float(d_max)))
    buffers = (running_mean, running_var, None)
    return run_batch_renorm(Call(input, weight, bias, residual, activation, options, buffers))


def run_batch_renorm(call: Call) -> Tensor:
    """run_batch_norm with a Renorm among the options. momentum None collects statistics: r = 1, d = 0 and the
    cumulative average, in which no channel is skipped for not being finite, because it would need a count of
    its own."""
    training, momentum, eps, renorm = call.options
    if not renorm.r_max >= 1:
        raise ValueError(f"batch_renorm r_max must be at least 1, but got {renorm.r_max}")
    if not renorm.d_max >= 0:
        raise ValueError(f"batch_renorm d_max must be at least 0, but got {renorm.d_max}")
    if not training:
        return run_batch_norm(call._replace(options=BatchNormOptions(False, momentum or 0.0, eps)))
    if call.buffers[0] is None or call.buffers[1] is None:
        raise ValueError("batch_renorm needs running_mean and running_var: it corrects towards them")
    if not torch.compiler.is_compiling():
        refuse_recomputation()
    if momentum is None:
        call = call._replace(options=call.options._replace(renorm=renorm._replace(guarded=False)))
    return run_batch_norm(call)
