"""LayerNorm's operators, for everything that looks at graphs: torch.ops.bnfast.layer_norm*. See batchnorm.py
on why they hold no autograd."""

from __future__ import annotations

import torch

from ..kernels import layer_norm as kernels
from ..kernels import layouts

_library = torch.library.Library("bnfast", "FRAGMENT")
_library.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, int dims, float eps, bool keep) -> (Tensor, Tensor)"
)
_library.define(
    "layer_norm_backward(Tensor x, Tensor dy, Tensor? weight, Tensor table, int dims, bool need_dx, "
    "ScalarType? weight_dtype, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)"
)
forward = torch.ops.bnfast.layer_norm.default
backward = torch.ops.bnfast.layer_norm_backward.default


def _forward(x, weight, bias, dims, eps, keep):  # type: ignore[no-untyped-def]
    y, table = kernels.forward(x.contiguous(), weight, bias, dims, eps, keep)
    return y, table if keep else x.new_empty(0, dtype=table.dtype)  # not one tensor for all calls


def _backward(x, dy, weight, table, dims, need_dx, weight_dtype, bias_dtype):  # type: ignore[no-untyped-def]
    gradients = kernels.backward(x, dy, weight, table, dims, need_dx, weight_dtype, bias_dtype)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _contiguous_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward_fake(x, weight, bias, dims, eps, keep):  # type: ignore[no-untyped-def]
    rows = 1
    for size in x.shape[:-dims]:
        rows = rows * size
    table = x.new_empty((2, rows) if keep else (0,), dtype=layouts.accumulator(x))
    return _contiguous_like(x), table


def _backward_fake(x, dy, weight, table, dims, need_dx, weight_dtype, bias_dtype):  # type: ignore[no-untyped-def]
    shape = x.shape[-dims:]
    return (
        _contiguous_like(x) if need_dx else x.new_empty(0),
        x.new_empty(0) if weight_dtype is None else x.new_empty(shape, dtype=weight_dtype),
        x.new_empty(0) if bias_dtype is None else x.new_empty(shape, dtype=bias_dtype),
    )


for _name, _real, _fake in (
    ("layer_norm", _forward, _forward_fake),
    ("layer_norm_backward", _backward, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"bnfast::{_name}", _fake, lib=_library)
