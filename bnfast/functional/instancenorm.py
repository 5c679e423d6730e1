"""torch.nn.functional.instance_norm over GroupNorm's kernels, and in eval over BatchNorm's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..kernels.epilogue import Activation, ActivationLike
from ..ops import instance_norm as ops
from ..ops.op import Call


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Instance normalization, as torch.nn.functional.instance_norm (Ulyanov et al. 2016, arXiv 1607.08022).

    input: [N, C, *], fp16, bf16, fp32 or fp64, any strides. running_mean, running_var, weight, bias: [C] or
    None, of dtypes of their own. Mean and variance of each channel of a sample are computed in fp32 (fp64 for
    fp64 input). With `use_input_stats` the running statistics, where given, are updated in place: new = (1 -
    momentum) * old + momentum * the samples' average of the statistic, with the unbiased variance. Without,
    they are what input is normalized with. activation, residual: as batch_norm's.

    Returns a tensor of input's shape and dtype, under autocast too. Contiguous, channels_last and
    channels_last_3d inputs give outputs of the same memory format, where torch's are contiguous. Raises what
    torch.nn.functional.instance_norm raises (ValueError for one value a channel and sample, RuntimeError for
    sizes and devices that do not match), before anything is updated."""
    if (
        has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
        and not torch.compiler.is_compiling()
    ):
        return handle_torch_function(
            instance_norm, (input, running_mean, running_var, weight, bias, residual), input,
            running_mean=running_mean, running_var=running_var, weight=weight, bias=bias,
            use_input_stats=use_input_stats, momentum=momentum, eps=eps, activation=activation,
            residual=residual,
        )  # fmt: skip
    if not isinstance(input, Tensor):  # torch's error
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    activation = None if activation is None else Activation.of(activation)
    channels = input.size(1) if input.dim() > 1 else 0
    options = ops.InstanceNormOptions(channels, eps, use_input_stats, momentum)
    buffers = (running_mean, running_var, None)
    return ops.instance_norm(Call(input, weight, bias, residual, activation, options, buffers))
