"""torch.nn.functional.group_norm over the kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..dispatch import (
    KERNEL_DTYPES,
    KERNELS,
    PLAIN,
    TORCH,
    TRITON,
    known,
    path,
    refuse_dtensor,
    transforming,
)
from .layernorm import _FLOATS, _HALVES, _autocasting

if TRITON:
    from ..autograd import groupnorm as autograd
    from ..kernels.layouts import dense
    from ..kernels.plan import TooLarge

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group normalization, as torch.nn.functional.group_norm (Wu and He 2018, arXiv 1803.08494).

    input: [N, C, *], fp16, bf16, fp32 or fp64, any strides; contiguous, channels_last and channels_last_3d
    inputs give outputs of the same memory format, others contiguous ones. num_groups: a divisor of C.
    weight, bias: [C] or None, of dtypes of their own. Mean and variance of each group of a sample are
    computed in fp32 (fp64 for fp64 input).

    Returns a tensor of input's shape and dtype. Under autocast too: on GPUs torch's own returns fp32 for fp16
    and bf16 input there, and takes twice the memory. Raises what torch.nn.functional.group_norm raises
    (ValueError for a batch of one value a group, RuntimeError for sizes and devices that do not match)."""
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            group_norm, (input, weight, bias), input, num_groups, weight=weight, bias=bias, eps=eps
        )
    if type(eps) is not float:
        eps = _as_torch_takes_it(eps)
    way = path(input)
    if (
        way == TORCH
        or type(num_groups) is not int
        or not 2 <= input.dim() <= 5
        or num_groups <= 0
        or input.size(1) % num_groups
        or input.numel() == num_groups  # one value a group: torch's ValueError
        or not vectors_fit(way, input, weight, bias)
    ):
        return _torch_group_norm(input, num_groups, weight, bias, eps)
    y = by_kernels(way, input, num_groups, weight, bias, eps)
    return _torch_group_norm(input, num_groups, weight, bias, eps) if y is None else y


def by_kernels(
    way: int, input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """What the kernels make of arguments that fit, or None where they cannot after all."""
    x = input if input.is_contiguous() else dense(input)
    options = (way, groups, eps)
    wanted = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    try:
        if not wanted:
            return autograd.run(x, weight, bias, options)[0]
        if way != KERNELS or not (x.is_inference() or (weight is not None and weight.is_inference())):
            return autograd.apply(x, weight, bias, options)
    except TooLarge:
        pass
    return None


def vectors_fit(way: int, x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors of a value a channel. What they cannot take goes to torch,
    which raises its own errors."""
    channels, device = x.size(1), x.device
    for t in vectors:
        if t is not None and (
            (type(t) not in PLAIN and (way == KERNELS or not known(t)))
            or t.dim() != 1
            or t.numel() != channels
            or not t.is_contiguous()
            or t.dtype not in KERNEL_DTYPES
            or t.device != device
        ):
            return False
    return True


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
        return in_order_of(x, F.group_norm(x, groups, weight, bias, eps))
    weight, bias = (t.float() if isinstance(t, Tensor) else t for t in (weight, bias))
    return in_order_of(x, F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype))


def needs_float(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch would give half precision another dtype, or take it with none of these parameters."""
    if not isinstance(x, Tensor) or x.dtype not in _HALVES:
        return False
    dtypes = [t.dtype for t in (weight, bias) if isinstance(t, Tensor)]
    mixed = any(d != x.dtype for d in dtypes) and all(d in _FLOATS for d in dtypes)
    return mixed or _autocasting(x)


def in_order_of(x: Tensor, y: Tensor) -> Tensor:
    """y in x's memory format, which torch does not keep everywhere. vmap's tensors cannot be asked for
    theirs."""
    memory_format = _FORMATS.get(x.dim())
    if memory_format is None or transforming() or x.layout is not torch.strided or x.is_contiguous():
        return y
    return y.contiguous(memory_format=memory_format) if x.is_contiguous(memory_format=memory_format) else y
