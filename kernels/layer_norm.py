"""LayerNorm on contiguous tensors: allocate, pick the plan, launch. Knows sizes and pointers, nothing of
autograd or modules.

x and dy are contiguous, fp16, bf16, fp32 or fp64, and normalized over their last `dims` dimensions; weight
and bias are contiguous, have the shape of these dimensions and any floating dtype; everything is on one
device. The caller has checked all that."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import row_plan
from .column_sums import column_sums_kernel
from .epilogue import NO_EPILOGUE, Activation, Epilogue
from .launch import Launch
from .layouts import accumulator, dense_like
from .plan import VECTOR_BYTES
from .records import Buffers, Forward, Gradients, LayerNormOptions, Wanted
from .row_activation import row_activation_kernel
from .row_gradients import column_gradients_kernel, row_gradients_kernel, wide_gradients_kernel
from .row_norm import long_row_norm_kernel, row_norm_kernel
from .steps import address, multiprocessors, step_for, where

_FORWARD = ("x", "y", "table", "weight", "bias", "z", "none")
_BACKWARD = (
    "x", "dy", "dx", "dweight", "dbias", "table", "weight", "bias", "z", "dz", "shares", "partials", "none",
)  # fmt: skip


@dataclass(frozen=True)
class RowStep:
    """Launches, one after another, and what they need allocated, in elements of the accumulator's type."""

    launches: tuple[Launch, ...]
    seed: Tensor  # empty, of the accumulator's dtype, on x's device: for allocating in less time
    rows: int
    shares: int = 0
    partials: int = 0


class RowSizes:
    """What a signature says of x, seen as rows of its last dimensions."""

    def __init__(self, x: Tensor, index: int, aligned: bool) -> None:
        self._shape, self._of_memory = x.shape, (x.element_size(), aligned, multiprocessors(index))
        self.aligned = aligned
        self.seed = torch.empty(0, dtype=accumulator(x), device=x.device)

    def rows(self, dims: int) -> row_plan.Rows:
        rows, width = prod(self._shape[:-dims]), prod(self._shape[-dims:])
        return row_plan.Rows(rows, width, *self._of_memory)


def _forward(
    sizes: RowSizes, dims: int, keep: bool, parameters_aligned: bool, activation: Activation, *rest: Any
) -> RowStep:
    size = sizes.rows(dims)
    kind, sweep = row_plan.forward(size)
    kernel = row_norm_kernel if kind == "held" else long_row_norm_kernel
    act, bound = {"ACT": activation}, sizes.aligned and parameters_aligned
    launch = Launch(kernel, sweep, _FORWARD, act, bound, without=() if keep else ("table",))
    return RowStep((launch,), sizes.seed, size.rows)


def _backward(
    sizes: RowSizes, dims: int, need_dx: bool, weight: bool, bias: bool, parameters_aligned: bool,
    activation: Activation, *rest: Any,
) -> RowStep:  # fmt: skip
    """weight, bias: whether their gradients are wanted."""
    size, halves = sizes.rows(dims), weight + bias
    bound = sizes.aligned and parameters_aligned
    rows = row_plan.gradients(size) if need_dx else None
    shares, launches, rename = 0, [], {}
    wanted, without = {"WEIGHT": weight, "BIAS": bias}, () if halves else ("partials",)
    if activation.name != "none":
        rename, sweep = {"dy": "dz"}, row_plan.activation(size)
        launches.append(Launch(row_activation_kernel, sweep, _BACKWARD, {"ACT": activation}, bound))
    if rows is not None:
        partials = rows.partials
        launches.append(
            Launch(row_gradients_kernel, rows, _BACKWARD, wanted, bound, rename=rename, without=without)
        )
    else:
        sweep = row_plan.column_gradients(size)
        partials = sweep.partials
        without = without if need_dx else (*without, "weight", "shares")
        launches.append(
            Launch(column_gradients_kernel, sweep, _BACKWARD, wanted, bound, rename=rename, without=without)
        )
        if need_dx:
            shares = sweep.geometry.blocks * 2 * size.rows
            wide = row_plan.wide_gradients(size)
            launches.append(Launch(wide_gradients_kernel, wide, _BACKWARD, {}, bound, rename=rename))
    if halves:
        sums, rename = row_plan.column_sums(partials, size.width, halves), {"first": "dweight"}
        rename["second"] = "dbias"
        without = () if halves == 2 else ("second",) if weight else ("first",)
        launches.append(
            Launch(column_sums_kernel, sums, _BACKWARD, {}, bound, rename=rename, without=without)
        )
    return RowStep(tuple(launches), sizes.seed, size.rows, shares, partials * halves * size.width)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, options: LayerNormOptions,
    epilogue: Epilogue = NO_EPILOGUE, keep: bool = True, private: bool = False,
) -> Forward:  # fmt: skip
    """The table is [2, rows] of mean and rstd if `keep`, for a backward, else an empty one; there are no
    buffers, no mask and no workspace. One launch."""
    index, stream = where(x)
    shape, eps = options
    # on the path of every call, so without what costs tenths of microseconds
    x_at = x.data_ptr()
    weight_at, weight_dtype = (None, None) if weight is None else (weight.data_ptr(), weight.dtype)
    bias_at, bias_dtype = (None, None) if bias is None else (bias.data_ptr(), bias.dtype)
    aligned = ((weight_at or 0) | (bias_at or 0)) % VECTOR_BYTES == 0
    activation, z, _ = epilogue
    z_at = None
    if z is not None:
        z = dense_like(z, x)
        z_at = z.data_ptr()
    step = step_for(
        _forward, x, index, x_at | (z_at or 0), len(shape), keep, aligned, activation, z is None,
        weight_dtype, bias_dtype, sizes=RowSizes,
    )  # fmt: skip
    y = torch.empty_like(x)
    table = step.seed.new_empty_strided((2, step.rows), (step.rows, 1)) if keep else step.seed
    tensors = (x, y, table, weight, bias, z, None)
    addresses = (x_at, y.data_ptr(), table.data_ptr() if keep else None, weight_at, bias_at, z_at, None)
    step.launches[0](stream, tensors, addresses, eps)
    return y, table, None


def backward(
    x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, bias: Tensor | None,
    options: LayerNormOptions, wanted: Wanted, epilogue: Epilogue = NO_EPILOGUE, private: bool = False,
) -> Gradients:  # fmt: skip
    """bias: read where there is an activation.

    One launch for dx, one more where a parameter wants its gradient, one more for rows too wide for the
    registers, and one for an activation. dy and x are read once, by dx of such wide rows twice, and once more
    through an activation."""
    index, stream = where(x)
    dims, (need_dx, weight_dtype, bias_dtype) = len(options.shape), wanted
    # saved tensors come back from their hooks in any shape of memory
    x, table = x.contiguous(), table.contiguous()
    through = epilogue is not NO_EPILOGUE
    weight = weight.contiguous() if weight is not None and (need_dx or through) else None
    bias = bias.contiguous() if bias is not None and through else None
    z = None if epilogue.residual is None else dense_like(epilogue.residual, x)
    dz = torch.empty_like(x) if through else None
    dy = dense_like(dy, x)
    shape = x.shape[-dims:]
    dx = torch.empty_like(x) if need_dx else None
    dweight = None if weight_dtype is None else table.new_empty(shape, dtype=weight_dtype)
    dbias = None if bias_dtype is None else table.new_empty(shape, dtype=bias_dtype)
    given = (x, dy, dx, dweight, dbias, table, weight, bias, z, dz)
    addresses = [None if t is None else t.data_ptr() for t in given]
    vectors = x.data_ptr() | dy.data_ptr() | table.data_ptr() | (address(z) or 0)
    aligned = ((addresses[6] or 0) | (addresses[7] or 0)) % VECTOR_BYTES == 0
    step = step_for(
        _backward, x, index, vectors, dims, need_dx, dweight is not None, dbias is not None, aligned,
        epilogue.activation, z is None, dy.dtype, weight_dtype, bias_dtype,
        *(None if t is None else t.dtype for t in (weight, bias)), sizes=RowSizes,
    )  # fmt: skip
    shares = step.seed.new_empty(step.shares) if step.shares else None
    partials = step.seed.new_empty(step.partials) if step.partials else None
    addresses += [None if t is None else t.data_ptr() for t in (shares, partials)]
    tensors, addresses = (*given, shares, partials, None), [*addresses, None]
    for launch in step.launches:
        launch(stream, tensors, addresses)
    return dx, dweight, dbias, dz
