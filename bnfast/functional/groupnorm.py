"""torch.nn.functional.group_norm over the kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..dispatch import TORCH, TRITON, ordinary, path, refuse_dtensor
from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.layouts import ordered, suggested
from .arguments import (
    as_float,
    check_residual,
    followed_by,
    in_format_of,
    needs_float,
    residual_fits,
    vectors_fit,
)

if TRITON:
    from ..autograd import groupnorm as autograd


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
    if type(eps) is not float:
        eps = _as_torch_takes_it(eps)
    after = None if activation is None else Activation.of(activation)
    if residual is not None:
        check_residual(input, residual)
    way = path(input)
    if not (
        way == TORCH
        or type(num_groups) is not int
        or not 2 <= input.dim() <= 5
        or num_groups <= 0
        or input.size(1) % num_groups
        or input.numel() in (0, num_groups)  # one value a group: torch's ValueError; newer ones' for none
        or not vectors_fit(way, input, weight, bias)
        or (residual is not None and not residual_fits(way, residual))
    ):
        y = autograd.normalize(ordered(input), weight, bias, residual, (way, after, num_groups, eps))
        if y is not None:
            return y
    bare = ordinary(way, input, weight, bias, residual)
    if bare is not None:
        x, weight, bias, residual = bare
        return group_norm(x, num_groups, weight, bias, eps, activation=after, residual=residual)
    return followed_by(_torch_group_norm(input, num_groups, weight, bias, eps), after, residual)


def _as_torch_takes_it(eps: Any) -> float:
    """Integers and 0-d tensors, which torch.nn.functional.group_norm takes for floats, or its TypeError."""
    F.group_norm(torch.ones(2, 1), 1, None, None, eps)
    return float(eps)


def _torch_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """torch's own group_norm, with a result as the kernels' is."""
    refuse_dtensor(x, weight, bias)
    if not needs_float(x, weight, bias):
        return in_format_of(x, F.group_norm(x, groups, weight, bias, eps), suggested)
    y = F.group_norm(x.float(), groups, as_float(weight), as_float(bias), eps)
    return in_format_of(x, y.to(x.dtype), suggested)
