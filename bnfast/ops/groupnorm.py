"""GroupNorm's operators, for everything that looks at graphs: torch.ops.bnfast.group_norm_*. InstanceNorm has
as many groups as channels. See batchnorm.py on why they hold no autograd, and workspaces of their own."""

from __future__ import annotations

import torch

from ..kernels import group_norm as kernels
from ..kernels import layouts

_library = torch.library.Library("bnfast", "FRAGMENT")
_library.define(
    "group_norm_forward(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)"
)
_library.define(
    "group_norm_backward(Tensor x, Tensor dy, Tensor table, Tensor? weight, int groups, bool need_dx, "
    "ScalarType? weight_dtype, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)"
)
forward = torch.ops.bnfast.group_norm_forward.default
backward = torch.ops.bnfast.group_norm_backward.default


def _forward(x, groups, weight, bias, eps):  # type: ignore[no-untyped-def]
    return kernels.forward(layouts.dense(x), groups, weight, bias, eps, own=True)


def _backward(x, dy, table, weight, groups, need_dx, weight_dtype, bias_dtype):  # type: ignore[no-untyped-def]
    gradients = kernels.backward(
        x, dy, table, weight, groups, need_dx, weight_dtype, bias_dtype, own=True
    )  # fmt: skip
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _forward_fake(x, groups, weight, bias, eps):  # type: ignore[no-untyped-def]
    return layouts.out_like(x), x.new_empty((2, x.shape[0] * groups), dtype=layouts.accumulator(x))


def _backward_fake(x, dy, table, weight, groups, need_dx, weight_dtype, bias_dtype):  # type: ignore[no-untyped-def]
    return (
        layouts.out_like(x) if need_dx else x.new_empty(0),
        x.new_empty(0) if weight_dtype is None else x.new_empty(x.shape[1], dtype=weight_dtype),
        x.new_empty(0) if bias_dtype is None else x.new_empty(x.shape[1], dtype=bias_dtype),
    )


for _name, _real, _fake in (
    ("group_norm_forward", _forward, _forward_fake),
    ("group_norm_backward", _backward, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"bnfast::{_name}", _fake, lib=_library)
