"""Memory orders of dense tensors: which the kernels take, and what results come in."""

from __future__ import annotations

from math import prod

import torch

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether C is the fastest dimension of a dense x. Where both layouts describe it, the one that suits
    the kernels: a plane of one position is a row; a single channel is a run."""
    if x.dim() == 2 or prod(x.shape[2:]) == 1:
        return True
    return not x.is_contiguous()


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where it is contiguous, channels_last or channels_last_3d; else a contiguous copy."""
    if x.is_contiguous():
        return x
    memory_format = _FORMATS.get(x.dim())
    if memory_format is not None and x.is_contiguous(memory_format=memory_format):
        return x
    return x.contiguous()


def out_like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor for a result: in x's memory order where x is dense, contiguous where it is not."""
    if dense(x) is x:
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def dense_like(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dy in the memory order of a dense x. Gradients come expanded (`y.sum()`), transposed, sliced: then it
    is copied.
    """
    if dy.is_neg() or dy._is_zerotensor():  # lazy: their memory does not hold their values
        dy = torch.zeros_like(x) if dy._is_zerotensor() else dy.resolve_neg()
    if dy.stride() == x.stride():
        return dy
    return dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else _FORMATS[x.dim()])


def accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
