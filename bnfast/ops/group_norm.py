"""GroupNorm for op.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ..dispatch import TRITON, refuse_dtensor
from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.layouts import ordered, ordered_like, suggested
from ..kernels.records import NO_BUFFERS, GroupNormOptions, new
from ..reference import groupnorm as reference
from . import op
from .arguments import in_float, in_format_of, overridden, vectors_fit
from .op import NO_KERNELS, Call, Kernels, Norm
from .operators import Layout, Packing, backward_operator, forward_operator


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
        weight (Tensor, optional): The channels' scales, [C], of any floating dtype. Default: None, for 1.
        bias (Tensor, optional): The channels' shifts, [C], of any floating dtype. Default: None, for 0.
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
        return overridden(group_norm, locals(), 2)
    if not isinstance(input, Tensor):  # torch's error
        return F.group_norm(input, num_groups, weight, bias, eps)
    activation = None if activation is None else Activation.of(activation)
    if type(eps) is not float:  # torch takes integers and 0-d tensors, and raises for others
        F.group_norm(torch.ones(2, 1), 1, None, None, eps)
        eps = float(eps)
    options = new(GroupNormOptions, (num_groups, eps, "group_norm"))
    return op.run(new(Call, (input, weight, bias, residual, activation, options, NO_BUFFERS)), NORM)


def accept(route: int, call: Call) -> Tensor | None:
    x, groups = call.x, call.options.groups
    shape = x.shape
    if (
        type(groups) is not int
        or not 2 <= len(shape) <= 5
        or groups <= 0
        or shape[1] % groups
        or x.numel() in (0, groups)  # torch raises for one value a group, newer versions for none too
        or not vectors_fit(route, x, shape[1], call.weight, call.bias)
    ):
        return None
    return x if 1 not in shape and x.is_contiguous() else ordered(x)


def _torch(call: Call) -> Tensor:
    """F.group_norm, with the dtype and memory format that the kernels' result has."""
    x, weight, bias, (groups, eps, _) = call.x, call.weight, call.bias, call.options
    refuse_dtensor(x, weight, bias)
    given, weight, bias = in_float(x, weight, bias)
    y = F.group_norm(given, groups, weight, bias, eps)
    return in_format_of(x, y if given is x else y.to(x.dtype), suggested)


class GroupNorm(torch.autograd.Function):
    """Saves x, gamma, and mean and rstd of each group of each sample."""

    forward = staticmethod(op.record)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return op.gradients(ctx, grads[0], NORM)


_kernels = NO_KERNELS
if TRITON:
    from ..kernels import group_norm as kernels

    _layout = Layout(ordered, ordered_like)
    _packing = Packing(
        "int groups, float eps, str kind",
        lambda x, *given: GroupNormOptions(*given),
        lambda options: (options.groups, options.eps, options.kind),
    )
    _forward = forward_operator(
        "group_norm_forward", kernels.forward, _layout, _packing,
        lambda x, options, keep: (2, x.shape[0] * options.groups),
    )  # fmt: skip
    _backward = backward_operator("group_norm_backward", kernels.backward, _layout, _packing)
    _kernels = Kernels(kernels.forward, kernels.backward, _forward, _backward)

NORM = Norm(accept, _torch, _kernels, reference.group_norm, reference.group_norm_backward, GroupNorm)
