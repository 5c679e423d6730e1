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
    """Group normalization, as torch.nn.functional.group_norm (Wu and He 2018, arXiv 1803.08494).

    input: [N, C, *], fp16, bf16, fp32 or fp64, any strides; contiguous, channels_last and channels_last_3d
    inputs give outputs of the same memory format, others contiguous ones. num_groups: a divisor of C.
    weight, bias: [C] or None, of dtypes of their own. Mean and variance of each group of a sample are
    computed in fp32 (fp64 for fp64 input). activation, residual: as batch_norm's.

    Returns a tensor of input's shape and dtype. Under autocast too: on GPUs torch's own returns fp32 for fp16
    and bf16 input there, and takes twice the memory. Raises what torch.nn.functional.group_norm raises
    (ValueError for a batch of one value a group, RuntimeError for sizes and devices that do not match)."""
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
