"""GroupNorm's operators, which are InstanceNorm's too: torch.ops.bnfast.group_norm_*."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels import group_norm as kernels
from ..kernels import layouts
from ..kernels.epilogue import Epilogue
from ..kernels.records import NO_BUFFERS, Buffers, Forward, Gradients, GroupNormOptions, Wanted
from .op import Kernels
from .operators import (
    BACKWARD,
    FORWARD,
    WANTED,
    define,
    flat,
    gradients_like,
    mask_like,
    packed,
    present,
    with_mask,
    without_mask,
)

Made = tuple[Tensor, Tensor, Tensor]


def _forward(x: Tensor, groups: int, weight: Any, bias: Any, eps: float, *after: Any) -> Made:
    x, options = layouts.ordered(x), GroupNormOptions(groups, eps)
    return with_mask(kernels.forward(x, weight, bias, NO_BUFFERS, options, packed(*after), True, True))


def _forward_fake(x: Tensor, groups: int, weight: Any, bias: Any, eps: float, *after: Any) -> Made:
    y, table = layouts.ordered_like(x), (2, x.shape[0] * groups)
    return y, x.new_empty(table, dtype=layouts.accumulator(x)), mask_like(y, packed(*after))


def _backward(
    x: Tensor, dy: Tensor, table: Tensor, weight: Any, groups: int, *rest: Any
) -> tuple[Tensor, ...]:
    wanted, (bias, *after) = Wanted(*rest[:3]), rest[3:] or (None,)
    options = GroupNormOptions(groups, 0.0)
    return present(x, kernels.backward(x, dy, table, weight, bias, options, wanted, packed(*after), True))


def _backward_fake(
    x: Tensor, dy: Tensor, table: Tensor, weight: Any, groups: int, *rest: Any
) -> tuple[Tensor, ...]:
    residual = packed(*rest[4:]).residual is not None
    return gradients_like(layouts.out_like(x), x.shape[1], Wanted(*rest[:3]), residual)


forward = define(
    "group_norm_forward(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, "
    f"{FORWARD}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward = define(
    f"group_norm_backward(Tensor x, Tensor dy, Tensor table, Tensor? weight, int groups, {WANTED}, "
    f"Tensor? bias=None, {BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _operator(
    x: Tensor, weight: Any, bias: Any, buffers: Buffers, options: GroupNormOptions, epilogue: Epilogue,
    keep: bool,
) -> Forward:  # fmt: skip
    return without_mask(forward(x, options.groups, weight, bias, options.eps, *flat(epilogue)))


def _operator_backward(
    x: Tensor, dy: Tensor, table: Tensor, weight: Any, bias: Any, options: GroupNormOptions, wanted: Wanted,
    epilogue: Epilogue,
) -> Gradients:  # fmt: skip
    after = (*epilogue.activation, epilogue.residual)
    found: Gradients = backward(x, dy, table, weight, options.groups, *wanted, bias, *after)
    return found


KERNELS = Kernels(kernels.forward, kernels.backward, _operator, _operator_backward)
