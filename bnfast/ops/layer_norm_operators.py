"""LayerNorm's operators: torch.ops.bnfast.layer_norm*."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import layer_norm as kernels
from ..kernels import layouts
from ..kernels.epilogue import Epilogue
from ..kernels.records import NO_BUFFERS, Buffers, Forward, Gradients, LayerNormOptions, Wanted
from .op import Kernels
from .operators import (
    BACKWARD,
    FORWARD,
    WANTED,
    define,
    flat,
    gradients_like,
    packed,
    present,
    with_mask,
    without_mask,
)

Made = tuple[Tensor, Tensor, Tensor]


def _forward(x: Tensor, weight: Any, bias: Any, dims: int, eps: float, keep: bool, *after: Any) -> Made:
    x, options = layouts.contiguous(x), LayerNormOptions(x.shape[-dims:], eps)
    epilogue = packed(*after)._replace(mask=False)
    y, table, none = kernels.forward(x, weight, bias, NO_BUFFERS, options, epilogue, keep)
    # not one tensor for all calls
    return with_mask((y, table if keep else x.new_empty(0, dtype=table.dtype), none))


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward_fake(x: Tensor, weight: Any, bias: Any, dims: int, eps: float, keep: bool, *after: Any) -> Made:
    rows = 1
    for size in x.shape[:-dims]:
        rows = rows * size
    table = x.new_empty((2, rows) if keep else (0,), dtype=layouts.accumulator(x))
    return with_mask((_contiguous_like(x), table, None))


def _backward(x: Tensor, dy: Tensor, weight: Any, table: Tensor, dims: int, *rest: Any) -> tuple[Tensor, ...]:
    wanted, (bias, *after) = Wanted(*rest[:3]), rest[3:] or (None,)
    options = LayerNormOptions(x.shape[-dims:], 0.0)
    return present(x, kernels.backward(x, dy, table, weight, bias, options, wanted, packed(*after)))


def _backward_fake(
    x: Tensor, dy: Tensor, weight: Any, table: Tensor, dims: int, *rest: Any
) -> tuple[Tensor, ...]:
    through = packed(*rest[4:]).activation.name != "none"
    return gradients_like(_contiguous_like(x), x.shape[-dims:], Wanted(*rest[:3]), through)


forward = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, int dims, float eps, bool keep, "
    f"{FORWARD}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward = define(
    f"layer_norm_backward(Tensor x, Tensor dy, Tensor? weight, Tensor table, int dims, {WANTED}, "
    f"Tensor? bias=None, {BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _operator(
    x: Tensor, weight: Any, bias: Any, buffers: Buffers, options: LayerNormOptions, epilogue: Epilogue,
    keep: bool,
) -> Forward:  # fmt: skip
    return without_mask(forward(x, weight, bias, len(options.shape), options.eps, keep, *flat(epilogue)))


def _operator_backward(
    x: Tensor, dy: Tensor, table: Tensor, weight: Any, bias: Any, options: LayerNormOptions, wanted: Wanted,
    epilogue: Epilogue,
) -> Gradients:  # fmt: skip
    after = (*epilogue.activation, epilogue.residual)
    found: Gradients = backward(x, dy, weight, table, len(options.shape), *wanted, bias, *after)
    return found


KERNELS = Kernels(kernels.forward, kernels.backward, _operator, _operator_backward)
