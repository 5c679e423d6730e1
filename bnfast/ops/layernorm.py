"""LayerNorm's operators, for everything that looks at graphs: torch.ops.bnfast.layer_norm*. See batchnorm.py
on why they hold no autograd."""

from __future__ import annotations

import torch

from ..kernels import layer_norm as kernels
from ..kernels import layouts
from .followed import BACKWARD, FORWARD, define, epilogue, gradients_like, present, with_signs


def _forward(  # type: ignore[no-untyped-def]
    x, weight, bias, dims, eps, keep, activation="none", parameter=0.0, residual=None, signs=False
):
    after = epilogue(activation, parameter, residual)
    y, table, none = kernels.forward(layouts.contiguous(x), weight, bias, dims, eps, keep, after)
    # not one tensor for all calls
    return with_signs((y, table if keep else x.new_empty(0, dtype=table.dtype), none))


def _backward(  # type: ignore[no-untyped-def]
    x, dy, weight, table, dims, need_dx, weight_dtype, bias_dtype, bias=None, activation="none",
    parameter=0.0, kept=None,
):  # fmt: skip
    after, wanted = epilogue(activation, parameter, kept), (need_dx, weight_dtype, bias_dtype)
    return present(x, kernels.backward(x, dy, weight, table, dims, *wanted, bias, after))


def _contiguous_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward_fake(  # type: ignore[no-untyped-def]
    x, weight, bias, dims, eps, keep, activation="none", parameter=0.0, residual=None, signs=False
):
    rows = 1
    for size in x.shape[:-dims]:
        rows = rows * size
    table = x.new_empty((2, rows) if keep else (0,), dtype=layouts.accumulator(x))
    return with_signs((_contiguous_like(x), table, None))


def _backward_fake(  # type: ignore[no-untyped-def]
    x, dy, weight, table, dims, need_dx, weight_dtype, bias_dtype, bias=None, activation="none",
    parameter=0.0, kept=None,
):  # fmt: skip
    like, through = _contiguous_like(x), activation != "none"
    return gradients_like(like, x.shape[-dims:], need_dx, weight_dtype, bias_dtype, through)


forward = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, int dims, float eps, bool keep, "
    f"{FORWARD}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward = define(
    "layer_norm_backward(Tensor x, Tensor dy, Tensor? weight, Tensor table, int dims, bool need_dx, "
    "ScalarType? weight_dtype, ScalarType? bias_dtype, Tensor? bias=None, "
    f"{BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
