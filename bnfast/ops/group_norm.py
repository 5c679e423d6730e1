"""GroupNorm on the road of op.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import TRITON, refuse_dtensor
from ..kernels.layouts import ordered, suggested
from ..kernels.records import GroupNormOptions
from ..reference import groupnorm as reference
from . import op
from .arguments import as_float, in_format_of, needs_float, vectors_fit
from .op import NO_KERNELS, Call, Norm


def group_norm(call: Call) -> Tensor:
    """A call with GroupNormOptions, checked."""
    if type(call.options.eps) is not float:
        # integers and 0-d tensors, which torch's function takes for floats, or its TypeError
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
        or x.numel() in (0, groups)  # one value a group: torch's ValueError; newer ones' for none
        or not vectors_fit(route, x, call.weight, call.bias)
    )


def _torch(call: Call) -> Tensor:
    """torch's own group_norm, with a result as the kernels' is."""
    x, weight, bias, (groups, eps) = call.x, call.weight, call.bias, call.options
    refuse_dtensor(x, weight, bias)
    if not needs_float(x, weight, bias):
        return in_format_of(x, F.group_norm(x, groups, weight, bias, eps), suggested)
    y = F.group_norm(x.float(), groups, as_float(weight), as_float(bias), eps)
    return in_format_of(x, y.to(x.dtype), suggested)


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, table: Tensor, options: GroupNormOptions
) -> Tensor:
    return reference.group_norm(x, weight, bias, options.groups, options.eps)


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, table: Tensor, options: GroupNormOptions
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
    from . import group_norm_operators

    _kernels = group_norm_operators.KERNELS

NORM = Norm(_supports, ordered, _torch, _kernels, _reference, _reference_backward, GroupNorm)
