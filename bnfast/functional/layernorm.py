"""torch.nn.functional.layer_norm over the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import NO_BUFFERS, LayerNormOptions, new
from ..ops import layer_norm as ops
from ..ops.op import Call


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Layer normalization as torch.nn.functional.layer_norm, and act(normalized + residual) with it.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each row, that is over the last dimensions, and are computed in fp32, for
    fp64 input in fp64.

    Args:
        input (Tensor): What is normalized.
        normalized_shape (sequence of int): The sizes of the last dimensions, which are normalized together.
        weight (Tensor, optional): The scale, of shape normalized_shape and any floating dtype. Default: None,
            which is 1.
        bias (Tensor, optional): The shift, of shape normalized_shape and any floating dtype. Default: None,
            which is 0.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        activation: The activation that is applied in the same kernels, after the residual: None, a name such
            as ``"relu"``, a name and its number such as ``("leaky_relu", 0.2)``, or torch's own module, class
            or function, such as ``nn.ReLU()``, ``nn.ReLU`` or ``F.relu``. bnfast.activation.NAMES lists the
            names. Keyword only. Default: None.
        residual (Tensor, optional): What is added to the normalized values before the activation, of input's
            shape, dtype and device, in any strides. Keyword only. Default: None.

    Shape:
        - input: (*, *normalized_shape), of fp16, bf16, fp32 or fp64, in any strides.
        - residual: as input.
        - output: as input, contiguous.

    Returns:
        A contiguous tensor of input's shape and dtype, under autocast too: torch's own returns fp32 for fp16
        and bf16 input there, and takes twice the memory.

    Raises:
        RuntimeError: Shapes or devices do not match, or normalized_shape is empty, as in
            torch.nn.functional.layer_norm.
        ValueError: The activation is unknown, or the residual's shape, dtype or device differs from the
            input's.
        TypeError: The residual is not a tensor, or an argument has a type that torch refuses.

    Example:
        >>> x, shortcut = torch.randn(8, 10, 32), torch.randn(8, 10, 32)
        >>> y = bnfast.functional.layer_norm(x, (32,), activation="gelu", residual=shortcut)
        >>> torch.allclose(y, F.gelu(F.layer_norm(x, (32,)) + shortcut), atol=1e-5)
        True

    References:
        Ba, Kiros and Hinton 2016, "Layer Normalization", arXiv 1607.06450.
    """
    if has_torch_function_variadic(input, weight, bias, residual) and not torch.compiler.is_compiling():
        return handle_torch_function(
            layer_norm, (input, weight, bias, residual), input, normalized_shape, weight=weight, bias=bias,
            eps=eps, activation=activation, residual=residual,
        )  # fmt: skip
    if not isinstance(input, Tensor):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # torch's TypeError
    activation = None if activation is None else Activation.of(activation)
    options = new(LayerNormOptions, (normalized_shape, eps))
    return ops.layer_norm(new(Call, (input, weight, bias, residual, activation, options, NO_BUFFERS)))
