"""BatchNorm on dense tensors: allocate, pick the plan, launch. Knows sizes and pointers, nothing of
autograd or modules.

x is contiguous, channels_last or channels_last_3d (see `dense`) and dy in the same order, fp16, bf16, fp32
or fp64; parameters and running statistics are contiguous and of any floating dtype; everything is on one
device. The caller has checked all that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .epilogue import IDENTITY, NO_EPILOGUE, Activation, Epilogue
from .gradients import gradient_sums_kernel, gradient_transform_kernel
from .launch import workspace
from .layouts import dense, dense_like
from .normalizers.batch_norm import BATCH_NORM
from .normalizers.batch_renorm import BATCH_RENORM
from .normalizers.moments import MOMENTS
from .records import BatchNormOptions, Buffers, Forward, Gradients, Wanted
from .statistics import statistics_kernel
from .steps import Sizes, Step, address, step_for, where
from .transform import transform_kernel

_NO_LIMITS = (0.0, 0.0, 0.0, 0.0, 0.0)
# the tensors that launches pick from, by the names that kernels know them by
_FORWARD = (
    "x", "weight", "bias", "running_mean", "running_var", "batches", "y", "table", "partials", "arrivals",
    "z", "signs", "none",
)  # fmt: skip
_INFERENCE = ("x", "weight", "bias", "running_mean", "running_var", "y", "table", "z", "signs", "none")
_BACKWARD = (
    "x", "dy", "dx", "dweight", "dbias", "table", "z", "signs", "dz", "partials", "arrivals", "gradients",
    "none",
)  # fmt: skip
_OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")


def _train(
    sizes: Sizes, cumulative: bool, renorm: bool, guarded: bool, activation: Activation, z: bool, *rest: Any,
) -> Step:  # fmt: skip
    constants = {"NORM": BATCH_NORM, "CENTRED": True, "ACT": activation}
    transform = sizes.mapping(transform_kernel, 1 + z, _FORWARD, constants, without=_OF_CHANNELS)
    # read by the first, for the cumulative average and Batch Renorm's schedule, counted by the second
    without = () if cumulative or renorm else ("batches",)
    norm = replace(BATCH_RENORM if renorm else BATCH_NORM, cumulative=cumulative, guarded=guarded)
    return sizes.reducing(statistics_kernel, 1, _FORWARD, {"NORM": norm}, transform, without=without)


def _moments(sizes: Sizes) -> Step:
    without = (*_OF_CHANNELS, "batches")
    return sizes.reducing(statistics_kernel, 1, _FORWARD, {"NORM": MOMENTS}, without=without)


def _eval(sizes: Sizes, keep: bool, activation: Activation, z: bool, *rest: Any) -> Step:
    constants = {"NORM": None, "CENTRED": True, "ACT": activation}
    without = () if keep else ("table",)
    transform = sizes.mapping(transform_kernel, 1 + z, _INFERENCE, constants, without=without)
    return Step(transform, transform, sizes.seed)


def _scale(sizes: Sizes, *dtypes: Any) -> Step:
    constants = {"NORM": BATCH_NORM, "CENTRED": False, "ACT": IDENTITY}
    transform = sizes.mapping(transform_kernel, 1, _BACKWARD, constants, rename={"x": "dy", "y": "dx"})
    return Step(transform, transform, sizes.seed)


def _gradients(
    sizes: Sizes, training: bool, renorm: bool, need_dx: bool, activation: Activation, residual: bool,
    z: bool, *rest: Any,
) -> Step:  # fmt: skip
    transform = None
    if training and need_dx:
        constants = {"NORM": BATCH_NORM, "ACT": IDENTITY if residual else activation}
        rename = {"dy": "dz"} if residual else {}
        transform = sizes.mapping(gradient_transform_kernel, 2, _BACKWARD, constants, rename=rename)
    without = [] if training and need_dx else ["gradients"]
    if training:
        without.append("dx")
    constants = {"NORM": BATCH_RENORM if renorm else BATCH_NORM, "ACT": activation}
    return sizes.reducing(gradient_sums_kernel, 2 + z, _BACKWARD, constants, transform, without=without)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, options: BatchNormOptions,
    epilogue: Epilogue = NO_EPILOGUE, keep: bool = True, private: bool = False,
) -> Forward:  # fmt: skip
    """The table is [4, C], [6, C] for Batch Renormalization. In training two launches, which update the
    running statistics and the batch counter in place; in eval one, and an empty table unless `keep`, for a
    backward. private: see launch.workspace."""
    if not options.training:
        return _inference(x, weight, bias, buffers, options.eps, epilogue, keep)
    index, stream = where(x)
    running_mean, running_var, batches = buffers
    _, momentum, eps, renorm = options
    # on the path of every call, so one by one: a comprehension costs a third of a microsecond
    x_at = x.data_ptr()
    weight_at, weight_type = (None, None) if weight is None else (weight.data_ptr(), weight.dtype)
    bias_at, bias_type = (None, None) if bias is None else (bias.data_ptr(), bias.dtype)
    mean_at, mean_type = (
        (None, None) if running_mean is None else (running_mean.data_ptr(), running_mean.dtype)
    )
    var_at, var_type = (None, None) if running_var is None else (running_var.data_ptr(), running_var.dtype)
    batches_at = None if batches is None else batches.data_ptr()
    limits, guarded = _NO_LIMITS, False
    if renorm is not None:
        limits, guarded = renorm[:5], renorm.guarded
    z = mask = z_at = mask_at = None
    vectors = x_at
    if epilogue is not NO_EPILOGUE:
        z, mask = epilogue.in_forward(x)
        z_at, mask_at = address(z), address(mask)
        vectors |= z_at or 0
    step = step_for(
        _train, x, index, vectors, momentum is None, renorm is not None, guarded, epilogue.activation,
        z is not None, mask is None, weight_type, bias_type, mean_type, var_type, batches is None,
    )  # fmt: skip
    y = torch.empty_like(x)
    channels = x.shape[1]
    rows = 4 if renorm is None else 6
    table = step.seed.new_empty_strided((rows, channels), (channels, 1))  # half of new_empty's host time
    partials, counters = workspace(index, stream, step.seed, step.partials, step.counters, private)
    tensors = (
        x, weight, bias, running_mean, running_var, batches, y, table, partials, counters, z, mask, None
    )  # fmt: skip
    addresses = (
        x_at, weight_at, bias_at, mean_at, var_at, batches_at,
        y.data_ptr(), table.data_ptr(), partials.data_ptr(), counters.data_ptr(), z_at, mask_at, None,
    )  # fmt: skip
    step.first(stream, tensors, addresses, eps, 0.0 if momentum is None else momentum, *limits)
    step.second(stream, tensors, addresses, eps)
    return y, table, mask


def _inference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, eps: float, epilogue: Epilogue,
    keep: bool,
) -> Forward:  # fmt: skip
    index, stream = where(x)
    z, mask = epilogue.in_forward(x)
    given = (x, weight, bias, buffers[0], buffers[1])
    addresses = [address(t) for t in given]
    dtypes = [None if t is None else t.dtype for t in given]
    vectors = x.data_ptr() | (address(z) or 0)
    after = (epilogue.activation, z is not None, mask is None)
    step = step_for(_eval, x, index, vectors, keep, *after, *dtypes)
    y = torch.empty_like(x)
    table = step.seed.new_empty((4, x.shape[1]) if keep else 0)
    tensors = (*given, y, table, z, mask, None)
    addresses += (y.data_ptr(), table.data_ptr(), address(z), address(mask), None)
    step.first(stream, tensors, addresses, eps)
    return y, table, mask


def moments(x: Tensor, private: bool = False) -> Tensor:
    """[3, C]: mean, M2 (the sum of squared deviations from it) and count of each channel. One launch."""
    index, stream = where(x)
    step = step_for(_moments, x, index, x.data_ptr())
    table = step.seed.new_empty((3, x.shape[1]))
    partials, counters = workspace(index, stream, step.seed, step.partials, step.counters, private)
    none = (None,) * 6
    tensors = (x, *none, table, partials, counters, None, None, None)
    addresses = [address(t) for t in tensors]
    step.first(stream, tensors, addresses, 0.0, 0.0, *_NO_LIMITS)
    return table


def backward(
    x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, bias: Tensor | None,
    options: BatchNormOptions, wanted: Wanted, epilogue: Epilogue = NO_EPILOGUE, private: bool = False,
) -> Gradients:  # fmt: skip
    """gamma and beta are in the table: weight and bias are not read.

    Two launches in training, one where dx is not wanted; one in eval, which reads x only if a parameter
    needs a gradient, or an activation its slope."""
    index, stream = where(x)
    training, (need_dx, weight_dtype, bias_dtype) = options.training, wanted
    # saved tensors come back from their hooks in any shape of memory
    x, table = dense(x), table.contiguous()
    dy = dense_like(dy, x)
    channels, dtypes = x.shape[1], (dy.dtype, weight_dtype, bias_dtype)
    z, mask = epilogue.in_backward(x)
    residual = z is not None or mask is not None
    dx = torch.empty_like(x) if need_dx else None
    dz = torch.empty_like(x) if residual else None
    dweight = None if weight_dtype is None else table.new_empty(channels, dtype=weight_dtype)
    dbias = None if bias_dtype is None else table.new_empty(channels, dtype=bias_dtype)
    given = (x, dy, dx, dweight, dbias, table, z, mask, dz)
    addresses = [None if t is None else t.data_ptr() for t in given]
    vectors = x.data_ptr() | dy.data_ptr() | table.data_ptr() | (addresses[6] or 0)
    if not training and dweight is None and dbias is None and epilogue is NO_EPILOGUE:
        step = step_for(_scale, x, index, vectors, dtypes)
        step.first(stream, (*given, None, None, None, None), (*addresses, None, None, None, None), 0.0)
        return dx, None, None, None
    renorm = table.shape[0] == 6
    step = step_for(
        _gradients, x, index, vectors, training, renorm, need_dx, epilogue.activation, residual,
        z is not None, dtypes,
    )  # fmt: skip
    gradients = table.new_empty_strided((3, channels), (channels, 1)) if training and need_dx else None
    partials, counters = workspace(index, stream, step.seed, step.partials, step.counters, private)
    tensors = (*given, partials, counters, gradients, None)
    addresses += [None if t is None else t.data_ptr() for t in (partials, counters, gradients, None)]
    step.first(stream, tensors, addresses, x.numel() / channels)
    if gradients is not None:
        step.second(stream, tensors, addresses)
    return dx, dweight, dbias, dz
