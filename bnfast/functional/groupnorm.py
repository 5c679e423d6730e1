"""torch.nn.functional.group_norm over the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import NO_BUFFERS, GroupNormOptions, new
from ..ops import group_norm as ops
from ..ops.op import Call


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Group normalization as torch.nn.functional.group_norm, and act(normalized + residual) with it.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each group of a sample, C / num_groups neighbouring channels, and are
    computed in fp32, for fp64 input in fp64.

    Args:
        input (Tensor): What is normalized.
        num_groups (int): The number of groups, a divisor of C.
        weight (Tensor, optional): The scale of each channel, [C], of any floating dtype. Default: None, which
            is 1.
        bias (Tensor, optional): The shift of each channel, [C], of any floating dtype. Default: None, which
            is 0.
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
          memory format, others contiguous ones.

    Returns:
        A tensor of input's shape and dtype, under autocast too: on GPUs torch's own returns fp32 for fp16 and
        bf16 input there, and takes twice the memory.

    Raises:
        ValueError: The whole batch has a single value for each group, the activation is unknown, or the
            residual's shape, dtype or device differs from the input's.
        RuntimeError: Sizes or devices do not match, as in torch.nn.functional.group_norm.
        TypeError: The residual is not a tensor, or an argument has a type that torch refuses.

    Example:
        >>> x, shortcut = torch.randn(8, 16, 4, 4), torch.randn(8, 16, 4, 4)
        >>> y = bnfast.functional.group_norm(x, 4, activation="silu", residual=shortcut)
        >>> torch.allclose(y, F.silu(F.group_norm(x, 4) + shortcut), atol=1e-5)
        True

    References:
        Wu and He 2018, "Group Normalization", arXiv 1803.08494.
    """
    if has_torch_function_variadic(input, weight, bias, residual) and not torch.compiler.is_compiling():
        return handle_torch_function(
            group_norm, (input, weight, bias, residual), input, num_groups, weight=weight, bias=bias, eps=eps,
            activation=activation, residual=residual,
        )  # fmt: skip
    if not isinstance(input, Tensor):  # torch's error
        return F.group_norm(input, num_groups, weight, bias, eps)
    activation = None if activation is None else Activation.of(activation)
    options = new(GroupNormOptions, (num_groups, eps))
    return ops.group_norm(new(Call, (input, weight, bias, residual, activation, options, NO_BUFFERS)))
