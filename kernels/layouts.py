"""Memory orders of dense tensors: those that the kernels take, and those of results."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether C is the fastest dimension of a dense x. If both layouts describe x, the answer is the one that
    suits the kernels: channels_last with one position, contiguous with one channel."""
    if x.dim() == 2 or prod(x.shape[2:]) == 1:
        return True
    return not x.is_contiguous()


def suggested(x: torch.Tensor) -> torch.memory_format:
    """The format that x's strides suggest, as ATen's suggest_memory_format. Where sizes of 1 leave two
    formats possible, their strides decide too; in doubt it is contiguous."""
    memory_format = FORMATS.get(x.dim())
    sizes, strides = x.shape, x.stride()
    if memory_format is None or strides[1] == 0:
        return torch.contiguous_format
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[d] * sizes[d]
    return memory_format


def format_in_batch_norm(x: torch.Tensor) -> torch.memory_format:
    """The format of the result of torch's batch_norm: on a CPU the one that x is in, if any; else, as with
    cuDNN, the one that its strides suggest."""
    if x.is_cpu:
        if x.is_contiguous():
            return torch.contiguous_format
        if _is_dense(x):
            return FORMATS[x.dim()]
    return suggested(x)


def format_in_instance_norm(x: torch.Tensor) -> torch.memory_format:
    """channels_last if x is that and not contiguous too. torch's instance_norm returns contiguous tensors."""
    memory_format = suggested(x)
    if x.is_contiguous() or not x.is_contiguous(memory_format=memory_format):
        return torch.contiguous_format
    return memory_format


def ordered(
    x: torch.Tensor, format_of: Callable[[torch.Tensor], torch.memory_format] = suggested
) -> torch.Tensor:  # fmt: skip
    """x itself if it has the strides of its format in every dimension; a view if only strides of sizes of 1
    differ; else a copy."""
    if 1 in x.shape:
        return x if _is_in_order(x) else _with_own_strides(x, format_of(x))
    return x if _is_dense(x) else x.contiguous(memory_format=format_of(x))


def ordered_like(
    x: torch.Tensor, format_of: Callable[[torch.Tensor], torch.memory_format] = suggested
) -> torch.Tensor:  # fmt: skip
    """An empty tensor for the kernels' result, in the memory order of ordered(x)."""
    if 1 not in x.shape and _is_dense(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=format_of(x))


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """x.contiguous(), with these strides in every dimension: see `ordered`."""
    if 1 not in x.shape:
        return x.contiguous()
    return x if _is_in_order(x) else _with_own_strides(x, torch.contiguous_format)


def _is_in_order(x: torch.Tensor) -> bool:
    """Whether x has the strides of a contiguous tensor in every dimension, so that they suggest no other
    format."""
    step = 1
    for size, stride in zip(x.shape[::-1], x.stride()[::-1], strict=True):
        if stride != step:
            return False
        step *= size
    return True


def _with_own_strides(x: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    x, step = x.contiguous(memory_format=memory_format), 1
    sizes, strides = x.shape, x.stride()
    if x.numel() == 1:  # whose stride a view keeps, unless it has no dimensions
        return x.view(()).view(sizes)
    last = memory_format is not torch.contiguous_format
    for d in (1, *range(x.dim() - 1, 1, -1), 0) if last else range(x.dim() - 1, -1, -1):
        if strides[d] != step:
            break
        step *= sizes[d]
    else:
        return x
    if not last:
        return x.view(-1).view(sizes)
    rows = x.movedim(1, -1)
    return rows.reshape(-1).view(rows.shape).movedim(-1, 1)


def _is_dense(x: torch.Tensor) -> bool:
    if x.is_contiguous():
        return True
    memory_format = FORMATS.get(x.dim())
    return memory_format is not None and x.is_contiguous(memory_format=memory_format)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if it is contiguous, channels_last or channels_last_3d; else a copy in the format that its
    strides suggest."""
    return x if _is_dense(x) else x.contiguous(memory_format=suggested(x))


def out_like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor for a result, as torch.empty_like makes one of dense(x)."""
    return torch.empty_like(x) if _is_dense(x) else torch.empty_like(x, memory_format=suggested(x))


def dense_like(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dy in the memory order of a dense x. Gradients may be expanded (`y.sum()`), transposed or sliced;
    those are copied."""
    if dy.is_neg() or dy._is_zerotensor():  # lazy: their memory does not hold their values
        dy = torch.zeros_like(x) if dy._is_zerotensor() else dy.resolve_neg()
    if dy.stride() == x.stride():
        return dy
    return dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else FORMATS[x.dim()])


def accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
