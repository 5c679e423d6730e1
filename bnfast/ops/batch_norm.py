"""BatchNorm and Batch Renormalization for op.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ..dispatch import KERNELS, TRITON
from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.layouts import format_in_batch_norm, ordered, ordered_like
from ..kernels.records import BatchNormOptions, Forward, Renorm, new
from ..reference import batchnorm as reference
from ..reference.batchrenorm import refuse_recomputation
from . import op
from .arguments import overridden, vectors_fit
from .op import NO_KERNELS, Call, Kernels, Norm
from .operators import Layout, Packing, backward_operator, forward_operator
from .torch_batch_norm import torch_batch_norm, verify_batch_size

_FLOAT_OR_NONE = (float, type(None))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalization as torch.nn.functional.batch_norm, and act(normalized + residual) with it.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Statistics are computed in fp32, for fp64 input in fp64. With `training`, mean and variance of each
    channel are the batch's, and the running statistics, where given, are updated in place: new = (1 -
    momentum) * old + momentum * statistic of the batch, with the unbiased variance. Otherwise the running
    statistics are used.

    Args:
        input (Tensor): What is normalized.
        running_mean (Tensor or None): [C], of any floating dtype. Required unless training.
        running_var (Tensor or None): [C], of any floating dtype. Required unless training.
        weight (Tensor, optional): The channels' scales, [C], of any floating dtype. Default: None, for 1.
        bias (Tensor, optional): The channels' shifts, [C], of any floating dtype. Default: None, for 0.
        training (bool): Whether to normalize with the batch's statistics. Default: False.
        momentum (float): The weight of the batch in the running statistics. Default: 0.1.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
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
        ValueError: In training, a channel has a single value or eps is not positive; the activation is
            unknown; or the residual's shape, dtype or device differs from the input's. All before anything is
            updated.
        RuntimeError: Sizes or devices do not match, as in torch.nn.functional.batch_norm.
        TypeError: The residual is not a tensor, or an argument has a type that torch refuses.

    Example:
        >>> x, mean, variance = torch.randn(8, 16, 4, 4), torch.zeros(16), torch.ones(16)
        >>> y = bnfast.functional.batch_norm(x, mean, variance, training=True, activation="relu")
        >>> torch.allclose(mean, 0.1 * x.mean((0, 2, 3)), atol=1e-6)
        True

    References:
        Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
        Covariate Shift", arXiv 1502.03167.
    """
    if (
        has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
        and not torch.compiler.is_compiling()
    ):
        return overridden(batch_norm, locals(), 3)
    if momentum is None or not isinstance(input, Tensor):  # torch's TypeError
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    activation = None if activation is None else Activation.of(activation)
    options = new(BatchNormOptions, (training, momentum, eps, None))
    buffers = (running_mean, running_var, None)
    return run_batch_norm(new(Call, (input, weight, bias, residual, activation, options, buffers)))


def run_batch_norm(call: Call) -> Tensor:
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


def _as_torch_takes_them(training: Any, momentum: Any, eps: Any) -> tuple[bool, float | None, float]:
    """Floats of the integers and 0-d tensors that F.batch_norm accepts for floats, or its TypeError."""
    x = torch.ones(2, 1)
    F.batch_norm(x, x[0], x[1], None, None, training, 0.0 if momentum is None else momentum, eps)
    return training, None if momentum is None else float(momentum), float(eps)


def accept(
    route: int, call: Call, format_of: Callable[[Tensor], torch.memory_format] = format_in_batch_norm
) -> Tensor | None:
    """See op.Norm; InstanceNorm's too, with its own format."""
    x, weight, bias, _, _, options, (mean, variance, batches) = call
    training, shape = options.training, x.shape  # read once: each reading makes a new Size
    if not 2 <= len(shape) <= 5 or (not training and (mean is None or variance is None)):
        return None
    if not vectors_fit(route, x, shape[1], mean, variance, weight, bias):
        return None
    if mean is not None and variance is not None:
        if (mean.requires_grad or variance.requires_grad) and torch.is_grad_enabled():
            return None
        # inference tensors are updated in inference mode only
        inference = training and route == KERNELS and (mean.is_inference() or variance.is_inference())
        if inference and not torch.is_inference_mode_enabled():
            return None
    elif mean is not None or variance is not None:
        return None
    if batches is not None and (
        batches.device != x.device or batches.dtype != torch.int64 or batches.numel() != 1
    ):
        return None
    if training and shape[0] == 1 and x.numel() == shape[1]:
        verify_batch_size(shape)  # raises
    return x if 1 not in shape and x.is_contiguous() else ordered(x, format_of)


def _ordered(x: Tensor) -> Tensor:
    return ordered(x, format_in_batch_norm)


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

    def _forward(x: Tensor, weight: Any, bias: Any, buffers: Any, options: Any, *rest: Any) -> Forward:
        if options.renorm is not None:
            refuse_recomputation()
        return kernels.forward(x, weight, bias, buffers, options, *rest)

    def _pack(x: Tensor, momentum: float | None, eps: float, limits: Any, guarded: bool) -> BatchNormOptions:
        renorm = None if limits is None else Renorm._make((*limits, guarded))
        return BatchNormOptions(True, momentum, eps, renorm)

    def _unpack(options: BatchNormOptions) -> tuple[Any, ...]:
        _, momentum, eps, renorm = options
        return momentum, eps, *((None, False) if renorm is None else (list(renorm[:5]), renorm.guarded))

    _train = forward_operator(
        "batch_norm_train",
        _forward,
        _layout,
        Packing("float? momentum, float eps, float[]? limits, bool guarded", _pack, _unpack),
        lambda x, options, keep: (4 if options.renorm is None else 6, x.shape[1]),
        "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches",
    )
    _eval = forward_operator(
        "batch_norm_eval",
        kernels.forward,
        _layout,
        Packing("float eps", lambda x, eps: BatchNormOptions(False, 0.0, eps), lambda o: (o.eps,)),
        lambda x, options, keep: (4, x.shape[1]) if keep else (0,),
        "Tensor running_mean, Tensor running_var",
    )

    def _operator(x: Tensor, weight: Any, bias: Any, buffers: Any, options: Any, *rest: Any) -> Forward:
        return (_train if options.training else _eval)(x, weight, bias, buffers, options, *rest)

    _backward = backward_operator(
        "batch_norm_backward",
        kernels.backward,
        _layout,
        Packing("bool training", lambda x, t: BatchNormOptions(t, 0.0, 0.0), lambda o: (o.training,)),
    )
    _kernels = Kernels(kernels.forward, kernels.backward, _operator, _backward)


def _written(call: Call, route: int) -> None:
    """Tells autograd that the kernels have written to the buffers, which others may have saved for a
    backward. Operators do so themselves."""
    if route == KERNELS and call.options.training and not torch.is_inference_mode_enabled():
        torch._C._increment_version([t for t in call.buffers if t is not None])


_formulas = reference.batch_norm, reference.batch_norm_backward
NORM = Norm(accept, torch_batch_norm, _kernels, *_formulas, BatchNorm, _written)
