"""GroupNorm for op.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import TRITON, refuse_dtensor
from ..kernels.layouts import ordered, ordered_like, suggested
from ..kernels.records import GroupNormOptions
from ..reference import groupnorm as reference
from . import op
from .arguments import as_float, in_format_of, needs_float, vectors_fit
from .op import NO_KERNELS, Call, Kernels, Norm
from .operators import Layout, Packing, backward_operator, forward_operator


def group_norm(call: Call) -> Tensor:
    """Checks the options of a call, GroupNormOptions, and runs it."""
    if type(call.options.eps) is not float:
        # F.group_norm accepts integers and 0-d tensors for floats; for anything else it raises its TypeError
        F.group_norm(torch.ones(2, 1), 1, None, None, call.options.eps)
        call = call._replace(options=call.options._replace(eps=float(call.options.eps)))
    return op.run(call, NORM)


def _supports(route: int, call: Call) -> bool:
    x, groups = call.x, call.options.groups
    return not (
        type(groups) is not int
        or not 2 <= x.dim() <= 5
        or groups <= 0
        or x.size(1) % groups
        or x.numel() in (0, groups)  # torch raises for one value a group, newer versions for none too
        or not vectors_fit(route, x, call.weight, call.bias)
    )


def _torch(call: Call) -> Tensor:
    """F.group_norm, with the dtype and memory format that the kernels' result has."""
    x, weight, bias, (groups, eps) = call.x, call.weight, call.bias, call.options
    refuse_dtensor(x, weight, bias)
    if not needs_float(x, weight, bias):
        return in_format_of(x, F.group_norm(x, groups, weight, bias, eps), suggested)
    y = F.group_norm(x.float(), groups, as_float(weight), as_float(bias), eps)
    return in_format_of(x, y.to(x.dtype), suggested)


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, options: GroupNormOptions
) -> Tensor:
    return reference.group_norm(x, weight, bias, options.groups, options.eps)


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: GroupNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.group_norm_backward(dy, x, weight, options.groups, options.eps)


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
    _kernels = Kernels(
        kernels.forward,
        kernels.backward,
        forward_operator(
            "group_norm_forward",
            kernels.forward,
            _layout,
            Packing("int groups, float eps", lambda x, *given: GroupNormOptions(*given), tuple),
            lambda x, options, keep: (2, x.shape[0] * options.groups),
        ),
        backward_operator(
            "group_norm_backward",
            kernels.backward,
            _layout,
            Packing("int groups", lambda x, groups: GroupNormOptions(groups, 0.0), lambda o: (o.groups,)),
        ),
    )

NORM = Norm(_supports, ordered, _torch, _kernels, _reference, _reference_backward, GroupNorm)
