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
    """Instance normalization as torch.nn.functional.instance_norm, and act(normalized + residual) with it.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    With `use_input_stats`, mean and variance are those of each channel of a sample, and the running
    statistics, where given, are updated in place: new = (1 - momentum) * old + momentum * the samples'
    average of the statistic, with the unbiased variance. Without, the running statistics are what input is
    normalized with. Statistics are computed in fp32, for fp64 input in fp64.

    Args:
        input (Tensor): What is normalized.
        running_mean (Tensor, optional): [C], of any floating dtype. Required without use_input_stats.
        running_var (Tensor, optional): [C], of any floating dtype. Required without use_input_stats.
        weight (Tensor, optional): The scale of each channel, [C], of any floating dtype. Default: None, which
            is 1.
        bias (Tensor, optional): The shift of each channel, [C], of any floating dtype. Default: None, which
            is 0.
        use_input_stats (bool): Whether to normalize with the statistics of the input. Default: True.
        momentum (float): The weight of the batch in the running statistics. Default: 0.1.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        activation: The activation that is applied in the same kernels, after the residual: None, a name such
            as ``"relu"``, a name and its number such as ``("leaky_relu", 0.2)``, or torch's own module, class
            or function, such as ``nn.ReLU()``, ``nn.ReLU`` or ``F.relu``. bnfast.activation.NAMES lists the
            names. Keyword only. Default: None.
        residual (Tensor, optional): What is added to the normalized values before the activation, of input's
            shape, dtype and device, in any strides. Keyword only. Default: None.

    Shape:
        - input: (N, C, *), of fp16, bf16, fp32 or fp64, in any strides.
        - residual: as input.
        - output: as input. Contiguous, channels_last and channels_last_3d inputs give outputs of the same
          memory format, where torch's are contiguous.

    Returns:
        A tensor of input's shape and dtype, under autocast too.

    Raises:
        ValueError: A channel of a sample has a single value, the activation is unknown, or the residual's
            shape, dtype or device differs from the input's. All before anything is updated.
        RuntimeError: Sizes or devices do not match, as in torch.nn.functional.instance_norm.
        TypeError: The residual is not a tensor, or an argument has a type that torch refuses.

    Example:
        >>> x = torch.randn(8, 16, 4, 4)
        >>> y = bnfast.functional.instance_norm(x, activation=("leaky_relu", 0.2))
        >>> torch.allclose(y, F.leaky_relu(F.instance_norm(x), 0.2), atol=1e-5)
        True

    References:
        Ulyanov, Vedaldi and Lempitsky 2016, "Instance Normalization: The Missing Ingredient for Fast
        Stylization", arXiv 1607.08022.
    """
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
