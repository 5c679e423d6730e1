"""BatchNorm on dense tensors: allocate, pick the plan, launch. Knows sizes and pointers, nothing of autograd or modules.

x is best contiguous, channels_last or channels_last_3d (anything else is copied), fp16, bf16, fp32 or fp64; parameters and running statistics
are contiguous and of any floating dtype; everything is on one device. The caller has checked all that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from . import plan
from .gradients import gradient_sums_kernel, gradient_transform_kernel
from .launch import INTERPRET, Launch, arrivals
from .statistics import statistics_kernel
from .transform import transform_kernel

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@lru_cache
def multiprocessors(index: int) -> int:
    """SMs to plan for. The interpreter runs programs one after another, so there a few show all there is to see."""
    if INTERPRET or index < 0:
        return int(os.environ.get("BNFAST_INTERPRETER_SMS", "2"))
    return torch.cuda.get_device_properties(index).multi_processor_count


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether C is the fastest dimension of a dense x. Where both layouts describe it, the one that suits the kernels: a
    plane of one position is a row; a single channel is a run."""
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
    """dy in the memory order of a dense x. Gradients come expanded (`y.sum()`), transposed, sliced: then it is copied."""
    if dy.stride() == x.stride():
        return dy
    return dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else _FORMATS[x.dim()])


def accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _aligned(*tensors: torch.Tensor | None) -> bool:
    pointers = 0
    for t in tensors:
        if t is not None:
            pointers |= t.data_ptr()
    return pointers % plan.VECTOR_BYTES == 0


def _dtype(t: torch.Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


@dataclass(frozen=True)
class _Step:
    """A launch with all that does not change between calls of one signature."""

    launch: Launch
    sizes: tuple[int, ...]
    partials: int = 0
    blocks: int = 0


_steps: dict[Any, _Step] = {}


def _step(kind: str, x: torch.Tensor, index: int, aligned: bool, *rest: Any) -> _Step:
    """The step for this signature. `rest`: dtypes and flags that the compiled kernel depends on."""
    key = (kind, x.shape, x.stride(), x.dtype, index, aligned, rest)
    step = _steps.get(key)
    if step is None:
        if len(_steps) >= 8192:  # shapes that never repeat must not fill the host's memory
            _steps.clear()
        step = _steps[key] = _make_step(kind, x, index, aligned, rest)
    return step


def forget_plans() -> None:
    """Plan anew from here on: for tests that change what plans depend on."""
    multiprocessors.cache_clear()
    _steps.clear()


def _make_step(kind: str, x: torch.Tensor, index: int, aligned: bool, rest: tuple[Any, ...]) -> _Step:
    n, c, s = x.shape[0], x.shape[1], prod(x.shape[2:])
    size = (n, c, s, x.element_size(), is_channels_last(x), aligned, multiprocessors(index))
    if kind in ("statistics", "gradient_sums"):
        sweep = plan.reduce_sweep(*size, 1 if kind == "statistics" else 2)
        v = sweep.view
        constants: tuple[Any, ...] = (
            plan.MODES[v.mode], sweep.vec, sweep.unroll, sweep.group, v.lanes, v.channels_a_block, sweep.fold, v.positions, sweep.merge,
        )  # fmt: skip
        kernel = gradient_sums_kernel
        if kind == "statistics":
            constants += (rest[0],)  # CUMULATIVE
            kernel = statistics_kernel
    else:
        sweep = plan.map_sweep(*size, 2 if kind == "gradient_transform" else 1)
        constants = (plan.MODES[sweep.view.mode], sweep.vec, sweep.tile_rows, sweep.view.lanes)
        kernel = gradient_transform_kernel
        if kind == "transform":
            constants += rest[:2]  # EVAL, CENTRED
            kernel = transform_kernel
    launch = Launch(kernel, sweep.programs, sweep.warps, sweep.registers, constants, bind_once=aligned)
    return _Step(launch, sweep.sizes, sweep.partials, sweep.view.blocks)


def _on_its_device(function: Any) -> Any:
    """Triton launches on the current device, which need not be x's."""

    def wrapper(x: torch.Tensor, *args: Any) -> Any:
        index = x.get_device()
        if index < 0 or index == torch._C._cuda_getDevice():
            return function(x, index, *args)
        with torch.cuda.device(index):
            return function(x, index, *args)

    wrapper.__doc__ = function.__doc__
    return wrapper


@_on_its_device
def forward(
    x: torch.Tensor, index: int, weight: torch.Tensor | None, bias: torch.Tensor | None,
    running_mean: torch.Tensor | None, running_var: torch.Tensor | None, batches: torch.Tensor | None,
    cumulative: bool, momentum: float, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Training: -> (y, table [4, C]). Updates the running statistics and the batch counter in place. Two launches."""
    x = dense(x)
    aligned = _aligned(x, weight, bias, running_mean, running_var, batches)
    dtypes = (_dtype(weight), _dtype(bias), _dtype(running_mean), _dtype(running_var), batches is None)
    first = _step("statistics", x, index, aligned, cumulative, dtypes)
    second = _step("transform", x, index, aligned, False, True, batches is None)
    acc = accumulator(x)
    y = out_like(x)
    table = torch.empty((4, x.shape[1]), dtype=acc, device=x.device)
    partials = torch.empty(first.partials, dtype=acc, device=x.device)
    first.launch(
        index, x, partials, arrivals(x.device, index, first.blocks), table, weight, bias, running_mean, running_var,
        batches if cumulative else None, *first.sizes, eps, momentum,
    )  # fmt: skip
    second.launch(index, x, y, table, None, None, None, None, batches, *second.sizes, eps)
    return y, table


@_on_its_device
def inference(
    x: torch.Tensor, index: int, weight: torch.Tensor | None, bias: torch.Tensor | None,
    running_mean: torch.Tensor, running_var: torch.Tensor, eps: float, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Eval: -> (y, table [4, C] if `keep`, for a backward, else an empty one). One launch."""
    x = dense(x)
    aligned = _aligned(x, weight, bias, running_mean, running_var)
    dtypes = (_dtype(weight), _dtype(bias), running_mean.dtype, running_var.dtype, keep)
    step = _step("transform", x, index, aligned, True, True, dtypes)
    y = out_like(x)
    table = torch.empty((4, x.shape[1]) if keep else 0, dtype=accumulator(x), device=x.device)
    step.launch(
        index, x, y, table if keep else None, weight, bias, running_mean, running_var, None, *step.sizes, eps
    )  # fmt: skip
    return y, table


@_on_its_device
def backward(
    x: torch.Tensor, index: int, dy: torch.Tensor, table: torch.Tensor, training: bool,
    need_dx: bool, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """-> (dx, dweight, dbias), None where not wanted (a dtype of None: that parameter's gradient is not).

    Two launches in training, one where dx is not wanted; one in eval, which reads x only if a
    parameter needs a gradient.
    """
    x = dense(x)
    dy = dense_like(dy, x)
    aligned = _aligned(x, dy)
    channels, device = x.shape[1], x.device
    dx = out_like(x) if need_dx else None
    if not training and weight_dtype is None and bias_dtype is None:
        step = _step("transform", x, index, aligned, False, False, dy.dtype)
        step.launch(index, dy, dx, table, None, None, None, None, None, *step.sizes, 0.0)
        return dx, None, None
    wanted = need_dx and training
    acc = accumulator(x)
    dweight = None if weight_dtype is None else torch.empty(channels, dtype=weight_dtype, device=device)
    dbias = None if bias_dtype is None else torch.empty(channels, dtype=bias_dtype, device=device)
    gradients = torch.empty((3, channels), dtype=acc, device=device) if wanted else None
    first = _step("gradient_sums", x, index, aligned, weight_dtype, bias_dtype, need_dx, training, dy.dtype)
    partials = torch.empty(first.partials, dtype=acc, device=device)
    first.launch(
        index, dy, x, None if training else dx, partials, arrivals(device, index, first.blocks), table, gradients,
        dweight, dbias, *first.sizes, x.numel() / channels,
    )  # fmt: skip
    if wanted:
        second = _step("gradient_transform", x, index, aligned, dy.dtype)
        second.launch(index, dy, x, dx, table, gradients, *second.sizes)
    return dx, dweight, dbias
