"""GroupNorm on dense tensors, and InstanceNorm, which is GroupNorm with as many groups as channels.

A contiguous group that fits in a program's registers is read once (one_pass.py). Other groups are read twice:
contiguous ones as runs of memory; channels_last ones channel by channel, and the last program of a sample
merges the channels of each group.

x is as in batch_norm.py. stats is [2, N * groups], mean and rstd, in fp32 (fp64 for fp64 input)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import row_plan
from .column_sums import column_sums_kernel
from .elementwise import gradient_transform_kernel, transform_kernel
from .epilogue import IDENTITY, NO_EPILOGUE, Activation, Epilogue, kind_of
from .group_plan import OnePassPlan, one_pass
from .launch import Launch, workspace
from .launch_plan import LaunchPlan, Signature, address, device_and_stream, launch_plan
from .layouts import dense, dense_like
from .normalizers.common import Normalizer
from .normalizers.group_norm import CHANNELS, GROUPS
from .one_pass import group_norm_gradients_kernel, group_norm_kernel
from .records import ALONE, FIRST, LAST, Buffers, Forward, Gradients, GroupNormOptions, Wanted
from .reduce import gradient_sums_kernel, statistics_kernel

_FORWARD = ("x", "weight", "bias", "y", "stats", "residual", "relu_mask", "partials", "semaphores", "none")
_BACKWARD = (
    "x", "dy", "dx", "weight", "stats", "dweight", "dbias", "bias", "residual", "relu_mask", "dresidual",
    "sums", "partials", "semaphores", "dx_coeffs", "none",
)  # fmt: skip


# The policies for groups of one channel, and for others, by GroupNormOptions.kind. The one-pass kernels are
# GroupNorm's alone.
NORMALIZERS = {"group_norm": (CHANNELS, GROUPS)}


def _normalizer(signature: Signature, kind: str) -> Normalizer:
    """The policy for kernels that reduce channel by channel."""
    return NORMALIZERS[kind][signature.groups != signature.x.c]


def _one_pass(signature: Signature, kind: str, *how: Any) -> OnePassPlan | None:
    return one_pass(signature.x, signature.groups, *how) if kind == "group_norm" else None


def _forward(
    signature: Signature, groups: int, kind: str, activation: Activation, mask: str, residual: bool,
    *rest: Any,
) -> LaunchPlan:  # fmt: skip
    signature.groups = groups
    act = {"ACT": activation}
    plan = _one_pass(signature, kind, 1, activation.name, mask)
    if plan is not None:
        only = Launch(group_norm_kernel, plan, _FORWARD, act, signature.aligned)
        return LaunchPlan(only, None, signature.acc_like, signature.columns)
    transform = signature.elementwise(
        transform_kernel, 1 + residual, _FORWARD, {"NORM": NORMALIZERS[kind][1], "CENTRED": True, **act},
        overlap=LAST,
    )  # fmt: skip
    by_group = not signature.x.channels_last
    constants = {"NORM": NORMALIZERS[kind][0] if by_group else _normalizer(signature, kind)}
    without = ("weight", "bias")
    return signature.reduction(
        statistics_kernel, 1, _FORWARD, constants, transform, by_group, without=without, overlap=FIRST
    )


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, options: GroupNormOptions,
    epilogue: Epilogue = NO_EPILOGUE, keep: bool = True, private: bool = False,
) -> Forward:  # fmt: skip
    """One launch and one read of x if a group fits in a program's registers, else two. There are no
    buffers."""
    index, stream = device_and_stream(x)
    groups, eps, kind = options.groups, options.eps, options.kind
    residual, relu_mask = epilogue.in_forward(x)
    given = (x, weight, bias)
    addresses = [None if t is None else t.data_ptr() for t in given]
    dtypes = [None if t is None else t.dtype for t in given]
    residual_at, relu_mask_at = address(residual), address(relu_mask)
    vectors = x.data_ptr() | (residual_at or 0)
    plan = launch_plan(
        _forward, x, index, vectors, groups, kind, epilogue.activation, kind_of(relu_mask),
        residual is not None, *dtypes,
    )  # fmt: skip
    y = torch.empty_like(x)
    stats = plan.acc_like.new_empty_strided((2, plan.columns), (plan.columns, 1))
    made = (*given, y, stats, residual, relu_mask)
    addresses += (y.data_ptr(), stats.data_ptr(), residual_at, relu_mask_at)
    if plan.second is None:
        plan.first(stream, made, addresses, eps)
        return y, stats, relu_mask
    partials, semaphores = workspace(index, stream, plan.acc_like, plan.partials, plan.semaphores, private)
    tensors = (*made, partials, semaphores, None)
    addresses += (partials.data_ptr(), semaphores.data_ptr(), None)
    plan.first(stream, tensors, addresses, eps, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    plan.second(stream, tensors, addresses, eps)
    return y, stats, relu_mask


@dataclass(frozen=True)
class _Gradients:
    """Up to three launches: the gradient sums (with one_pass, all of dx), the parameters' sums over samples,
    and dx."""

    sums: Launch
    parameters: Launch | None
    transform: Launch | None
    one_pass: bool
    acc_like: Tensor
    partials: int = 0
    semaphores: int = 0


def _backward(
    signature: Signature, groups: int, kind: str, need_dx: bool, need_parameters: bool,
    activation: Activation, kept: str, *rest: Any,
) -> _Gradients:  # fmt: skip
    signature.groups = groups
    parameters, act = None, {"ACT": activation}
    if need_parameters:
        columns = row_plan.column_sums(signature.x.n, signature.x.c, 2, signature.x.sms)
        rename = {"first": "dweight", "second": "dbias", "partials": "sums"}
        parameters = Launch(
            column_sums_kernel, columns, _BACKWARD, {}, signature.aligned, rename=rename, overlap=LAST
        )
    without = [] if need_parameters else ["sums"]
    held = _one_pass(signature, kind, 2, activation.name, kept) if need_dx else None
    if held is not None:
        only = Launch(
            group_norm_gradients_kernel, held, _BACKWARD, act, signature.aligned, without=without,
            overlap=FIRST if need_parameters else ALONE,
        )  # fmt: skip
        return _Gradients(only, parameters, None, True, signature.acc_like)
    transform = None
    if need_dx:
        constants = {"NORM": _normalizer(signature, kind), "ACT": IDENTITY if kept else activation}
        rename = {"dy": "dresidual"} if kept else {}
        transform = signature.elementwise(
            gradient_transform_kernel, 2, _BACKWARD, constants, rename=rename, overlap=LAST
        )
    without += ["dx", "dweight", "dbias"] + ([] if need_dx else ["dx_coeffs"])
    constants = {"NORM": _normalizer(signature, kind), **act}
    plan = signature.reduction(
        gradient_sums_kernel, 2 + (kept == "residual"), _BACKWARD, constants, without=without,
        overlap=FIRST if need_parameters or need_dx else ALONE,
    )  # fmt: skip
    return _Gradients(
        plan.first, parameters, transform, False, signature.acc_like, plan.partials, plan.semaphores
    )


def backward(
    x: Tensor, dy: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None,
    options: GroupNormOptions, wanted: Wanted, epilogue: Epilogue = NO_EPILOGUE, private: bool = False,
) -> Gradients:  # fmt: skip
    """bias is read only if there is an activation."""
    index, stream = device_and_stream(x)
    groups, kind, (need_dx, weight_dtype, bias_dtype) = options.groups, options.kind, wanted
    # hooks of saved tensors may return them in another memory order
    x, stats = dense(x), stats.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    dy = dense_like(dy, x)
    n, c = x.shape[:2]
    dx = torch.empty_like(x) if need_dx else None
    dweight = dbias = None
    if weight_dtype is not None or bias_dtype is not None:  # both come from one launch
        dweight = stats.new_empty(c, dtype=weight_dtype or stats.dtype)
        dbias = stats.new_empty(c, dtype=bias_dtype or stats.dtype)
    residual, relu_mask = epilogue.in_backward(x)
    kept = kind_of(relu_mask) if residual is None else "residual"
    dresidual = torch.empty_like(x) if kept else None
    given = (x, dy, dx, weight, stats, dweight, dbias, bias, residual, relu_mask, dresidual)
    addresses = [None if t is None else t.data_ptr() for t in given]
    dtypes = (dy.dtype, *(None if t is None else t.dtype for t in (weight, bias)), weight_dtype, bias_dtype)
    vectors = x.data_ptr() | dy.data_ptr() | stats.data_ptr() | (address(residual) or 0)
    plan = launch_plan(
        _backward, x, index, vectors, groups, kind, need_dx, dweight is not None, epilogue.activation,
        kept, dtypes,
    )  # fmt: skip
    sums = None if plan.parameters is None else stats.new_empty((n, 2, c))
    partials = semaphores = dx_coeffs = None
    if not plan.one_pass:
        partials, semaphores = workspace(
            index, stream, plan.acc_like, plan.partials, plan.semaphores, private
        )  # fmt: skip
        dx_coeffs = torch.empty_like(stats) if need_dx else None
    made = (sums, partials, semaphores, dx_coeffs, None)
    tensors = (*given, *made)
    addresses += [None if t is None else t.data_ptr() for t in made]
    if plan.one_pass:
        plan.sums(stream, tensors, addresses)
    else:
        plan.sums(stream, tensors, addresses, x.numel() / (n * groups))
    if plan.parameters is not None:
        plan.parameters(stream, tensors, addresses)
    if plan.transform is not None:
        plan.transform(stream, tensors, addresses)
    return dx, dweight if weight_dtype else None, dbias if bias_dtype else None, dresidual
