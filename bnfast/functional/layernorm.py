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
    """Layer normalization, as torch.nn.functional.layer_norm (Ba, Kiros and Hinton 2016, arXiv 1607.06450).

    input: [*, *normalized_shape], fp16, bf16, fp32 or fp64, any strides. weight, bias: normalized_shape or
    None, of dtypes of their own. Mean and variance of each row are computed in fp32 (fp64 for fp64 input).
    activation, residual: as batch_norm's.

    Returns a contiguous tensor of input's shape and dtype. Under autocast too: torch's own returns fp32 for
    fp16 and bf16 input there, and takes twice the memory. Raises what torch.nn.functional.layer_norm raises
    (RuntimeError for shapes that do not match and for an empty normalized_shape)."""
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
