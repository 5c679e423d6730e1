"""BatchNorm on dense tensors: allocate, pick the plan, launch. Knows sizes and pointers, nothing of
autograd or modules.

x is contiguous, channels_last or channels_last_3d (see `dense`) and dy in the same order, fp16, bf16, fp32
or fp64; parameters and running statistics are contiguous and of any floating dtype; everything is on one
device. The caller has checked all that."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from . import plan
from .gradients import gradient_sums_kernel, gradient_transform_kernel
from .launch import INTERPRET, Launch, arrivals, current_stream
from .statistics import statistics_kernel
from .transform import transform_kernel

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@lru_cache
def multiprocessors(index: int) -> int:
    """SMs to plan for. The interpreter runs programs one after another, so there a few show all there is to
    see.
    """
    if INTERPRET or index < 0:
        return int(os.environ.get("BNFAST_INTERPRETER_SMS", "2"))
    return torch.cuda.get_device_properties(index).multi_processor_count


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
    if dy.stride() == x.stride():
        return dy
    return dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else _FORMATS[x.dim()])


def accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dtype(t: torch.Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


@dataclass(frozen=True)
class _Step:
    """One or two launches with all that does not change between calls of one signature."""

    first: Launch
    second: Launch | None = None
    accumulator: torch.dtype = torch.float32
    partials: int = 0  # elements of workspace for the first
    blocks: int = 0  # arrival counters for the first


_steps: dict[Any, _Step] = {}


def _step(kind: str, x: torch.Tensor, index: int, addresses: int, *rest: Any) -> _Step:
    """The step for this signature. addresses: of all tensors, or-ed. `rest`: dtypes and flags that the
    compiled kernels depend on."""
    aligned = addresses % plan.VECTOR_BYTES == 0
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

    def mapping(kernel: Any, inputs: int, *flags: bool) -> Launch:
        sweep = plan.map_sweep(*size, inputs)
        constants = (plan.MODES[sweep.view.mode], sweep.vec, sweep.tile_rows, sweep.view.lanes, *flags)
        return Launch(kernel, sweep, constants, bind_once=aligned)

    def reducing(kernel: Any, inputs: int, second: Launch | None, *flags: bool) -> _Step:
        sweep = plan.reduce_sweep(*size, inputs)
        view, mode = sweep.view, plan.MODES[sweep.view.mode]
        tile = (mode, sweep.vec, sweep.unroll, sweep.group, view.lanes)
        constants = (*tile, view.channels_a_block, sweep.fold, view.positions, sweep.merge, *flags)
        first = Launch(kernel, sweep, constants, bind_once=aligned)
        return _Step(first, second, accumulator(x), sweep.partials, view.blocks)

    if kind == "train":
        return reducing(
            statistics_kernel, 1, mapping(transform_kernel, 1, False, True), rest[0]
        )  # CUMULATIVE
    if kind == "eval":
        return _Step(mapping(transform_kernel, 1, True, True))  # EVAL, CENTRED
    if kind == "scale":
        return _Step(mapping(transform_kernel, 1, False, False))
    wanted = kind == "backward"
    return reducing(gradient_sums_kernel, 2, mapping(gradient_transform_kernel, 2) if wanted else None)


def _where(x: torch.Tensor) -> tuple[int, int, bool]:
    """(device index, its current stream, whether another device is current: Triton launches on the current
    one).
    """
    index = x.get_device()
    if INTERPRET or index < 0:
        return index, 0, False
    return index, current_stream(index), index != torch._C._cuda_getDevice()


def forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    running_mean: torch.Tensor | None, running_var: torch.Tensor | None, batches: torch.Tensor | None,
    cumulative: bool, momentum: float, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Training: -> (y, table [4, C]). Updates the running statistics and the batch counter in place. Two
    launches."""
    index, stream, elsewhere = _where(x)
    if elsewhere:
        with torch.cuda.device(x.device):
            return forward(
                x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps
            )  # fmt: skip
    addresses, dtypes = x.data_ptr(), []
    for t in (weight, bias, running_mean, running_var, batches):
        if t is None:
            dtypes.append(None)
        else:
            addresses |= t.data_ptr()
            dtypes.append(t.dtype)
    step = _step("train", x, index, addresses, cumulative, *dtypes)
    y = torch.empty_like(x)
    table = x.new_empty((4, x.shape[1]), dtype=step.accumulator)
    partials = table.new_empty(step.partials)  # the quickest way to allocate: half of torch.empty's time
    counters, counted = arrivals(x.device, index, stream, step.blocks), batches if cumulative else None
    tensors = (x, partials, counters, table, weight, bias, running_mean, running_var, counted)
    step.first(stream, tensors, eps, momentum)
    step.second(stream, (x, y, table, None, None, None, None, batches), eps)  # type: ignore[misc]
    return y, table


def inference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    running_mean: torch.Tensor, running_var: torch.Tensor, eps: float, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Eval: -> (y, table [4, C] if `keep`, for a backward, else an empty one). One launch."""
    index, stream, elsewhere = _where(x)
    if elsewhere:
        with torch.cuda.device(x.device):
            return inference(x, weight, bias, running_mean, running_var, eps, keep)
    addresses = (
        x.data_ptr() | _address(weight) | _address(bias) | _address(running_mean) | _address(running_var)
    )
    step = _step(
        "eval", x, index, addresses, _dtype(weight), _dtype(bias), running_mean.dtype, running_var.dtype, keep
    )  # fmt: skip
    y = torch.empty_like(x)
    table = torch.empty((4, x.shape[1]) if keep else 0, dtype=accumulator(x), device=x.device)
    step.first(stream, (x, y, table if keep else None, weight, bias, running_mean, running_var, None), eps)
    return y, table


def backward(
    x: torch.Tensor, dy: torch.Tensor, table: torch.Tensor, training: bool,
    need_dx: bool, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """-> (dx, dweight, dbias), None where not wanted (a dtype of None: that parameter's gradient is not).

    Two launches in training, one where dx is not wanted; one in eval, which reads x only if a parameter
    needs a gradient."""
    index, stream, elsewhere = _where(x)
    if elsewhere:
        with torch.cuda.device(x.device):
            return backward(x, dy, table, training, need_dx, weight_dtype, bias_dtype)
    channels = x.shape[1]
    addresses = x.data_ptr() | dy.data_ptr()
    dx = torch.empty_like(x) if need_dx else None
    if not training and weight_dtype is None and bias_dtype is None:
        step = _step("scale", x, index, addresses, dy.dtype)
        step.first(stream, (dy, dx, table, None, None, None, None, None), 0.0)
        return dx, None, None
    wanted = need_dx and training
    kind = "backward" if wanted else "sums"
    step = _step(kind, x, index, addresses, weight_dtype, bias_dtype, need_dx, dy.dtype)
    dweight = None if weight_dtype is None else table.new_empty(channels, dtype=weight_dtype)
    dbias = None if bias_dtype is None else table.new_empty(channels, dtype=bias_dtype)
    gradients = table.new_empty((3, channels)) if wanted else None
    partials = table.new_empty(step.partials)
    counters, swept = arrivals(x.device, index, stream, step.blocks), None if training else dx
    tensors = (dy, x, swept, partials, counters, table, gradients, dweight, dbias)
    step.first(stream, tensors, x.numel() / channels)
    if step.second is not None:
        step.second(stream, (dy, x, dx, table, gradients))
    return dx, dweight, dbias
