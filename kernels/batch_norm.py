"""BatchNorm and Batch Renormalization on dense tensors: allocates, looks up the launch plan, launches. This
module sees sizes and pointers; it knows nothing of autograd or of modules.

x is contiguous, channels_last or channels_last_3d (see layouts.dense), dy has the same memory order, and both
are fp16, bf16, fp32 or fp64. Parameters and running statistics are contiguous and of any floating dtype. All
tensors are on one device. The caller has checked all of this."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batch_plan import Pass, plan_whole
from .elementwise import gradient_transform_kernel, transform_kernel
from .epilogue import IDENTITY, NO_EPILOGUE, Activation, Epilogue, EpiloguePlan, kind_of
from .launch import Launch, workspace
from .launch_plan import LaunchPlan, Signature, address, device_and_stream, launch_plan
from .layouts import dense, dense_like
from .normalizers.batch_norm import BATCH_NORM, MOMENTS
from .normalizers.batch_renorm import BATCH_RENORM
from .records import ALONE, FIRST, LAST, BatchNormOptions, Buffers, Forward, Gradients, Wanted
from .reduce import gradient_sums_kernel, statistics_kernel
from .whole_channels import batch_norm_gradients_kernel, batch_norm_kernel

_NO_LIMITS = (0.0, 0.0, 0.0, 0.0, 0.0)
# the names of the tensors that a call hands to its launches, which find theirs by the kernels' parameters
_FORWARD = (
    "x", "weight", "bias", "running_mean", "running_var", "batches", "y", "stats", "partials", "semaphores",
    "residual", "relu_mask", "none",
)  # fmt: skip
_INFERENCE = (
    "x", "weight", "bias", "running_mean", "running_var", "y", "stats", "residual", "relu_mask", "none",
)  # fmt: skip
_BACKWARD = (
    "x", "dy", "dx", "dweight", "dbias", "stats", "residual", "relu_mask", "dresidual", "partials",
    "semaphores", "dx_coeffs", "none",
)  # fmt: skip
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def _train(
    signature: Signature, cumulative: bool, renorm: bool, guarded: bool, activation: Activation,
    residual: bool, mask: str, *rest: Any,
) -> LaunchPlan:  # fmt: skip
    norm = replace(BATCH_RENORM if renorm else BATCH_NORM, cumulative=cumulative, guarded=guarded)
    counts = cumulative or renorm  # reads the counter: for the average, or for Batch Renorm's schedule
    whole = plan_whole(signature.x, Pass.forward(EpiloguePlan(activation.name, residual, mask)))
    if whole is not None:
        without = () if counts else ("semaphores",)
        only = Launch(
            batch_norm_kernel, whole, _FORWARD, {"NORM": norm, "ACT": activation}, signature.aligned,
            without=without,
        )  # fmt: skip
        return LaunchPlan(only, None, signature.acc_like, signature.columns, 0, int(counts))
    constants = {"NORM": BATCH_NORM, "CENTRED": True, "ACT": activation}
    transform = signature.elementwise(
        transform_kernel, 1 + residual, _FORWARD, constants, without=_PARAMETERS, overlap=LAST
    )
    # the first launch reads the counter, the second increments it
    without = () if counts else ("batches",)
    return signature.reduction(
        statistics_kernel, 1, _FORWARD, {"NORM": norm}, transform, without=without, overlap=FIRST
    )


def _moments(signature: Signature) -> LaunchPlan:
    without = (*_PARAMETERS, "batches")
    return signature.reduction(statistics_kernel, 1, _FORWARD, {"NORM": MOMENTS}, without=without)


def _eval(signature: Signature, keep: bool, activation: Activation, residual: bool, *rest: Any) -> LaunchPlan:
    constants = {"NORM": None, "CENTRED": True, "ACT": activation}
    without = () if keep else ("stats",)
    transform = signature.elementwise(transform_kernel, 1 + residual, _INFERENCE, constants, without=without)
    return LaunchPlan(transform, None, signature.acc_like, signature.columns)


def _scale(signature: Signature, *dtypes: Any) -> LaunchPlan:
    constants = {"NORM": BATCH_NORM, "CENTRED": False, "ACT": IDENTITY}
    transform = signature.elementwise(
        transform_kernel, 1, _BACKWARD, constants, rename={"x": "dy", "y": "dx"}
    )
    return LaunchPlan(transform, None, signature.acc_like, signature.columns)


def _gradients(
    signature: Signature, training: bool, renorm: bool, need_dx: bool, activation: Activation,
    kept: str, *rest: Any,
) -> LaunchPlan:  # fmt: skip
    norm = BATCH_RENORM if renorm else BATCH_NORM
    if training and need_dx:
        epilogue = EpiloguePlan(activation.name, bool(kept), kept if kept != "residual" else "")
        whole = plan_whole(signature.x, Pass.backward(epilogue))
        if whole is not None:
            constants = {"NORM": norm, "ACT": activation}
            only = Launch(batch_norm_gradients_kernel, whole, _BACKWARD, constants, signature.aligned)
            return LaunchPlan(only, None, signature.acc_like, signature.columns)
    transform = None
    if training and need_dx:
        constants = {"NORM": BATCH_NORM, "ACT": IDENTITY if kept else activation}
        rename = {"dy": "dresidual"} if kept else {}
        transform = signature.elementwise(
            gradient_transform_kernel, 2, _BACKWARD, constants, rename=rename, overlap=LAST
        )
    without = [] if training and need_dx else ["dx_coeffs"]
    if training:
        without.append("dx")
    constants = {"NORM": norm, "ACT": activation}
    return signature.reduction(
        gradient_sums_kernel, 2 + (kept == "residual"), _BACKWARD, constants, transform, without=without,
        overlap=ALONE if transform is None else FIRST,
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, options: BatchNormOptions,
    epilogue: Epilogue = NO_EPILOGUE, keep: bool = True, private: bool = False,
) -> Forward:  # fmt: skip
    """Training takes one launch or two (see batch_plan.py), which update the running statistics and the batch
    counter in place. Eval takes one. stats is [4, C], for Batch Renormalization [6, C], and in eval empty
    unless `keep`: whether a backward will follow. private: see launch.workspace."""
    if not options.training:
        return _inference(x, weight, bias, buffers, options.eps, epilogue, keep)
    index, stream = device_and_stream(x)
    running_mean, running_var, batches = buffers
    _, momentum, eps, renorm = options
    # Every call runs this, so one by one: a comprehension would cost a third of a microsecond.
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
    residual = relu_mask = residual_at = mask_at = None
    vectors = x_at
    if epilogue is not NO_EPILOGUE:
        residual, relu_mask = epilogue.in_forward(x)
        residual_at, mask_at = address(residual), address(relu_mask)
        vectors |= residual_at or 0
    plan = launch_plan(
        _train, x, index, vectors, momentum is None, renorm is not None, guarded, epilogue.activation,
        residual is not None, kind_of(relu_mask), weight_type, bias_type, mean_type, var_type,
        batches is None,
    )  # fmt: skip
    y = torch.empty_like(x)
    size = (4 if renorm is None else 6, plan.columns)
    stats = plan.acc_like.new_empty_strided(size, (plan.columns, 1))  # half of new_empty's host time
    partials, semaphores = workspace(index, stream, plan.acc_like, plan.partials, plan.semaphores, private)
    tensors = (
        x, weight, bias, running_mean, running_var, batches, y, stats, partials, semaphores, residual,
        relu_mask, None,
    )  # fmt: skip
    addresses = (
        x_at, weight_at, bias_at, mean_at, var_at, batches_at,
        y.data_ptr(), stats.data_ptr(), partials.data_ptr(), semaphores.data_ptr(), residual_at,
        mask_at, None,
    )  # fmt: skip
    plan.first(stream, tensors, addresses, eps, 0.0 if momentum is None else momentum, *limits)
    if plan.second is not None:
        plan.second(stream, tensors, addresses, eps)
    return y, stats, relu_mask


def _inference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, eps: float, epilogue: Epilogue,
    keep: bool,
) -> Forward:  # fmt: skip
    index, stream = device_and_stream(x)
    residual, relu_mask = epilogue.in_forward(x)
    given = (x, weight, bias, buffers[0], buffers[1])
    addresses = [address(t) for t in given]
    dtypes = [None if t is None else t.dtype for t in given]
    vectors = x.data_ptr() | (address(residual) or 0)
    kinds = (epilogue.activation, residual is not None, kind_of(relu_mask))
    plan = launch_plan(_eval, x, index, vectors, keep, *kinds, *dtypes)
    y = torch.empty_like(x)
    stats = plan.acc_like.new_empty((4, x.shape[1]) if keep else 0)
    tensors = (*given, y, stats, residual, relu_mask, None)
    addresses += (y.data_ptr(), stats.data_ptr(), address(residual), address(relu_mask), None)
    plan.first(stream, tensors, addresses, eps)
    return y, stats, relu_mask


def moments(x: Tensor, private: bool = False) -> Tensor:
    """Mean, M2 (the sum of squared deviations from the mean) and count of each channel, [3, C]. One
    launch."""
    index, stream = device_and_stream(x)
    plan = launch_plan(_moments, x, index, x.data_ptr())
    stats = plan.acc_like.new_empty((3, x.shape[1]))
    partials, semaphores = workspace(index, stream, plan.acc_like, plan.partials, plan.semaphores, private)
    none = (None,) * 6
    tensors = (x, *none, stats, partials, semaphores, None, None, None)
    addresses = [address(t) for t in tensors]
    plan.first(stream, tensors, addresses, 0.0, 0.0, *_NO_LIMITS)
    return stats


def backward(
    x: Tensor, dy: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None,
    options: BatchNormOptions, wanted: Wanted, epilogue: Epilogue = NO_EPILOGUE, private: bool = False,
) -> Gradients:  # fmt: skip
    """Training takes one launch or two (see batch_plan.py), one if dx is not wanted. Eval takes one, which
    reads x only if a parameter needs a gradient or an activation needs its slope. weight and bias are not
    read: stats contains gamma and beta."""
    index, stream = device_and_stream(x)
    training, (need_dx, weight_dtype, bias_dtype) = options.training, wanted
    # hooks of saved tensors may return them in another memory order
    x, stats = dense(x), stats.contiguous()
    dy = dense_like(dy, x)
    channels, dtypes = x.shape[1], (dy.dtype, weight_dtype, bias_dtype)
    residual, relu_mask = epilogue.in_backward(x)
    kept = kind_of(relu_mask) if residual is None else "residual"
    dx = torch.empty_like(x) if need_dx else None
    dresidual = torch.empty_like(x) if kept else None
    dweight = None if weight_dtype is None else stats.new_empty(channels, dtype=weight_dtype)
    dbias = None if bias_dtype is None else stats.new_empty(channels, dtype=bias_dtype)
    given = (x, dy, dx, dweight, dbias, stats, residual, relu_mask, dresidual)
    addresses = [None if t is None else t.data_ptr() for t in given]
    vectors = x.data_ptr() | dy.data_ptr() | stats.data_ptr() | (addresses[6] or 0)
    if not training and dweight is None and dbias is None and epilogue is NO_EPILOGUE:
        plan = launch_plan(_scale, x, index, vectors, dtypes)
        plan.first(stream, (*given, None, None, None, None), (*addresses, None, None, None, None), 0.0)
        return dx, None, None, None
    renorm = stats.shape[0] == 6
    plan = launch_plan(
        _gradients, x, index, vectors, training, renorm, need_dx, epilogue.activation, kept, dtypes,
    )  # fmt: skip
    dx_coeffs = None if plan.second is None else stats.new_empty_strided((3, channels), (channels, 1))
    partials, semaphores = workspace(index, stream, plan.acc_like, plan.partials, plan.semaphores, private)
    tensors = (*given, partials, semaphores, dx_coeffs, None)
    addresses += [None if t is None else t.data_ptr() for t in (partials, semaphores, dx_coeffs, None)]
    plan.first(stream, tensors, addresses, x.numel() / channels)
    if plan.second is not None:
        plan.second(stream, tensors, addresses)
    return dx, dweight, dbias, dresidual
