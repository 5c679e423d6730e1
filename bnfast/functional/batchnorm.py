"""torch.nn.functional's signatures over the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions, new
from ..ops import batch_norm as ops
from ..ops.op import Call


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
    """Batch normalization, as torch.nn.functional.batch_norm (Ioffe and Szegedy 2015, arXiv 1502.03167).

    input: [N, C, *], fp16, bf16, fp32 or fp64, any strides; contiguous, channels_last and channels_last_3d
    inputs give outputs of the same memory format, others contiguous ones. running_mean, running_var,
    weight, bias: [C] or None, of dtypes of their own; statistics are computed in fp32 (fp64 for fp64
    input). With `training` the running statistics, where given, are updated in place: new = (1 - momentum)
    * old + momentum * batch statistic, with the unbiased variance.

    Then, in the same kernels, act(normalized + residual): activation, None, a name (bnfast.activation.NAMES),
    a name and its parameter, as in ("leaky_relu", 0.2), or torch's module, class or function of one, as
    nn.ReLU or F.relu; residual, of input's shape, dtype and device, in any strides.

    Returns a tensor of input's shape and dtype. Raises what torch.nn.functional.batch_norm raises
    (ValueError for one value a channel in training and for eps <= 0 there, RuntimeError for sizes and
    devices that do not match), and ValueError for an activation or a residual that is not as said, before
    anything is updated."""
    if (
        has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
        and not torch.compiler.is_compiling()
    ):
        return handle_torch_function(
            batch_norm, (input, running_mean, running_var, weight, bias, residual), input, running_mean,
            running_var, weight=weight, bias=bias, training=training, momentum=momentum, eps=eps,
            activation=activation, residual=residual,
        )  # fmt: skip
    if momentum is None or not isinstance(input, Tensor):  # torch's TypeError
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    activation = None if activation is None else Activation.of(activation)
    options = new(BatchNormOptions, (training, momentum, eps, None))
    buffers = (running_mean, running_var, None)
    return ops.batch_norm(new(Call, (input, weight, bias, residual, activation, options, buffers)))
