"""LayerNorm on contiguous tensors: allocates, looks up the launch plan, launches. This module sees sizes and
pointers; it knows nothing of autograd or of modules.

x and dy are contiguous, of fp16, bf16, fp32 or fp64, and normalized over their last dimensions. weight and
bias are contiguous, of the shape of these dimensions and of any floating dtype. All tensors are on one
device. The caller has checked all of this."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import row_plan
from .column_sums import column_sums_kernel
from .epilogue import NO_EPILOGUE, SMOOTH, Activation, Epilogue
from .launch import Launch
from .launch_plan import address, device_and_stream, launch_plan, multiprocessors
from .layouts import accumulator, dense_like
from .plan import VECTOR_BYTES, cost_of
from .records import FIRST, LAST, MIDDLE, Buffers, Forward, Gradients, LayerNormOptions, Wanted
from .row_gradients import (
    column_gradients_kernel,
    row_activation_kernel,
    row_gradients_kernel,
    wide_gradients_kernel,
)
from .row_norm import long_row_norm_kernel, row_norm_kernel

_FORWARD = ("x", "y", "stats", "weight", "bias", "residual", "none")
_BACKWARD = (
    "x", "dy", "dx", "dweight", "dbias", "stats", "weight", "bias", "residual", "dresidual", "shares",
    "partials", "none",
)  # fmt: skip


@dataclass(frozen=True)
class RowLaunchPlan:
    """Launches in their order, and the workspace they need, in elements of the accumulator's type."""

    launches: tuple[Launch, ...]
    acc_like: Tensor  # as in launch_plan.LaunchPlan
    rows: int
    shares: int = 0
    partials: int = 0


class RowSignature:
    """Shape and dtype of x, which is seen as rows of its last dimensions."""

    def __init__(self, x: Tensor, index: int, aligned: bool) -> None:
        self._shape, self._of_memory = x.shape, (x.element_size(), aligned, multiprocessors(index))
        self.aligned = aligned
        self.acc_like = torch.empty(0, dtype=accumulator(x), device=x.device)

    def rows(self, dims: int) -> row_plan.Rows:
        rows, width = prod(self._shape[:-dims]), prod(self._shape[-dims:])
        return row_plan.Rows(rows, width, *self._of_memory)


def _forward(
    signature: RowSignature, dims: int, keep: bool, parameters_aligned: bool, activation: Activation,
    residual: bool, *rest: Any,
) -> RowLaunchPlan:  # fmt: skip
    size = signature.rows(dims)
    kind, plan = row_plan.forward(size, residual and cost_of(activation.name) == SMOOTH)
    kernel = row_norm_kernel if kind == "one_pass" else long_row_norm_kernel
    act, bound = {"ACT": activation}, signature.aligned and parameters_aligned
    launch = Launch(kernel, plan, _FORWARD, act, bound, without=() if keep else ("stats",))
    return RowLaunchPlan((launch,), signature.acc_like, size.rows)


def _backward(
    signature: RowSignature, dims: int, need_dx: bool, weight: bool, bias: bool, parameters_aligned: bool,
    activation: Activation, *rest: Any,
) -> RowLaunchPlan:  # fmt: skip
    """weight, bias: whether their gradients are wanted."""
    size, halves = signature.rows(dims), weight + bias
    bound = signature.aligned and parameters_aligned
    rows = row_plan.gradients(size) if need_dx else None
    shares, launches, rename = 0, [], {}
    wanted, without = {"WEIGHT": weight, "BIAS": bias}, () if halves else ("partials",)
    if activation.name != "none":
        rename, plan = {"dy": "dresidual"}, row_plan.activation(size)
        launches.append(Launch(row_activation_kernel, plan, _BACKWARD, {"ACT": activation}, bound))
    overlap = MIDDLE if launches else FIRST  # which may also be the last: its signal is to nobody then
    if rows is not None:
        partials = rows.partials
        launches.append(
            Launch(
                row_gradients_kernel, rows, _BACKWARD, wanted, bound, rename=rename, without=without,
                overlap=overlap,
            )
        )  # fmt: skip
    else:
        plan = row_plan.column_gradients(size)
        partials = plan.partials
        without = without if need_dx else (*without, "weight", "shares")
        launches.append(
            Launch(
                column_gradients_kernel, plan, _BACKWARD, wanted, bound, rename=rename, without=without,
                overlap=overlap,
            )
        )  # fmt: skip
        if need_dx:
            shares = plan.shares * 2 * size.rows
            wide = row_plan.wide_gradients(size)
            launches.append(
                Launch(wide_gradients_kernel, wide, _BACKWARD, {}, bound, rename=rename, overlap=LAST)
            )
    if halves:
        sums = row_plan.column_sums(partials, size.width, halves, size.sms)
        rename = {"first": "dweight", "second": "dbias"}
        without = () if halves == 2 else ("second",) if weight else ("first",)
        launches.append(
            Launch(
                column_sums_kernel, sums, _BACKWARD, {}, bound, rename=rename, without=without, overlap=LAST
            )
        )
    partials *= halves * size.width
    return RowLaunchPlan(tuple(launches), signature.acc_like, size.rows, shares, partials)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, options: LayerNormOptions,
    epilogue: Epilogue = NO_EPILOGUE, keep: bool = True, private: bool = False,
) -> Forward:  # fmt: skip
    """One launch. stats is [2, rows], mean and rstd, if `keep`: whether a backward will follow; else it is
    empty. There are no buffers, no mask of relu and no workspace."""
    index, stream = device_and_stream(x)
    shape, eps = options
    # Every call runs this: no comprehension, no property, nothing that costs a tenth of a microsecond.
    x_at = x.data_ptr()
    weight_at, weight_dtype = (None, None) if weight is None else (weight.data_ptr(), weight.dtype)
    bias_at, bias_dtype = (None, None) if bias is None else (bias.data_ptr(), bias.dtype)
    aligned = ((weight_at or 0) | (bias_at or 0)) % VECTOR_BYTES == 0
    activation, residual, _ = epilogue
    residual_at = None
    if residual is not None:
        residual = dense_like(residual, x)
        residual_at = residual.data_ptr()
    plan = launch_plan(
        _forward, x, index, x_at | (residual_at or 0), len(shape), keep, aligned, activation,
        residual is not None, weight_dtype, bias_dtype, signature=RowSignature,
    )  # fmt: skip
    y = torch.empty_like(x)
    stats = plan.acc_like.new_empty_strided((2, plan.rows), (plan.rows, 1)) if keep else plan.acc_like
    tensors = (x, y, stats, weight, bias, residual, None)
    stats_at = stats.data_ptr() if keep else None
    addresses = (x_at, y.data_ptr(), stats_at, weight_at, bias_at, residual_at, None)
    plan.launches[0](stream, tensors, addresses, eps)
    return y, stats, None


def backward(
    x: Tensor, dy: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None,
    options: LayerNormOptions, wanted: Wanted, epilogue: Epilogue = NO_EPILOGUE, private: bool = False,
) -> Gradients:  # fmt: skip
    """One launch for dx, one more if a parameter needs its gradient, one more for rows too wide for the
    registers, and one more for an activation. dy and x are read once; twice for rows too wide for the
    registers; and once more for an activation. bias is read only if there is an activation."""
    index, stream = device_and_stream(x)
    dims, (need_dx, weight_dtype, bias_dtype) = len(options.shape), wanted
    # hooks of saved tensors may return them in another memory order
    x, stats = x.contiguous(), stats.contiguous()
    through = epilogue is not NO_EPILOGUE
    weight = weight.contiguous() if weight is not None and (need_dx or through) else None
    bias = bias.contiguous() if bias is not None and through else None
    residual = None if epilogue.residual is None else dense_like(epilogue.residual, x)
    dresidual = torch.empty_like(x) if through else None
    dy = dense_like(dy, x)
    shape = x.shape[-dims:]
    dx = torch.empty_like(x) if need_dx else None
    dweight = None if weight_dtype is None else stats.new_empty(shape, dtype=weight_dtype)
    dbias = None if bias_dtype is None else stats.new_empty(shape, dtype=bias_dtype)
    given = (x, dy, dx, dweight, dbias, stats, weight, bias, residual, dresidual)
    addresses = [None if t is None else t.data_ptr() for t in given]
    vectors = x.data_ptr() | dy.data_ptr() | stats.data_ptr() | (address(residual) or 0)
    aligned = ((addresses[6] or 0) | (addresses[7] or 0)) % VECTOR_BYTES == 0
    plan = launch_plan(
        _backward, x, index, vectors, dims, need_dx, dweight is not None, dbias is not None, aligned,
        epilogue.activation, residual is None, dy.dtype, weight_dtype, bias_dtype,
        *(None if t is None else t.dtype for t in (weight, bias)), signature=RowSignature,
    )  # fmt: skip
    shares = plan.acc_like.new_empty(plan.shares) if plan.shares else None
    partials = plan.acc_like.new_empty(plan.partials) if plan.partials else None
    addresses += [None if t is None else t.data_ptr() for t in (shares, partials)]
    tensors, addresses = (*given, shares, partials, None), [*addresses, None]
    for launch in plan.launches:
        launch(stream, tensors, addresses)
    return dx, dweight, dbias, dresidual
