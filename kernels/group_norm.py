"""GroupNorm on dense tensors, and InstanceNorm, which is as many groups as channels.

Contiguous cells that a program can hold are read once (one_read.py). Others are swept twice: contiguous ones
as runs of memory, channels_last ones channel by channel, merged by the last of a sample's programs.

x as in batch_norm.py. A table is [2, N * groups] mean and rstd, in fp32 (fp64 for fp64)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import row_plan
from .cell_plan import CellSweep
from .column_sums import column_sums_kernel
from .epilogue import IDENTITY, NO_EPILOGUE, Activation, Epilogue
from .gradients import gradient_sums_kernel, gradient_transform_kernel
from .group_plan import held
from .launch import Launch, workspace
from .layouts import dense, dense_like
from .normalizers.common import Normalizer
from .normalizers.group_norm import CHANNELS, GROUPS
from .one_read import group_norm_gradients_kernel, group_norm_kernel
from .records import Buffers, Forward, Gradients, GroupNormOptions, Wanted
from .statistics import statistics_kernel
from .steps import Sizes, Step, address, step_for, where
from .transform import transform_kernel

_FORWARD = ("x", "weight", "bias", "y", "table", "z", "signs", "partials", "arrivals", "none")
_BACKWARD = (
    "x", "dy", "dx", "weight", "table", "dweight", "dbias", "bias", "z", "signs", "dz", "sums", "partials",
    "arrivals", "gradients", "none",
)  # fmt: skip


def _merged(sizes: Sizes) -> Normalizer:
    """How cells are merged, where the kernel sees channels."""
    return CHANNELS if sizes.groups == sizes.x.c else GROUPS


def _held(sizes: Sizes, groups: int, inputs: int, activation: str, kept: str) -> CellSweep | None:
    return held(sizes.x, groups, inputs, activation, kept)


def _forward(sizes: Sizes, groups: int, activation: Activation, signs: bool, z: bool, *rest: Any) -> Step:
    sizes.groups = groups
    act = {"ACT": activation}
    cells = _held(sizes, groups, 1, activation.name, "mask" if signs else "")
    if cells is not None:
        only = Launch(group_norm_kernel, cells, _FORWARD, act, sizes.aligned)
        return Step(only, only, sizes.seed)
    transform = sizes.mapping(
        transform_kernel, 1 + z, _FORWARD, {"NORM": GROUPS, "CENTRED": True, **act}
    )  # fmt: skip
    by_group = not sizes.x.channels_last
    constants = {"NORM": CHANNELS if by_group else _merged(sizes)}
    without = ("weight", "bias")
    return sizes.reducing(statistics_kernel, 1, _FORWARD, constants, transform, by_group, without=without)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, options: GroupNormOptions,
    epilogue: Epilogue = NO_EPILOGUE, keep: bool = True, private: bool = False,
) -> Forward:  # fmt: skip
    """The table, which comes by the way, is [2, N * groups]. There are no buffers. One launch and one read of
    x where a cell fits a program, else two."""
    index, stream = where(x)
    groups, eps = options.groups, options.eps
    z, signs = epilogue.in_forward(x)
    given = (x, weight, bias)
    addresses = [None if t is None else t.data_ptr() for t in given]
    dtypes = [None if t is None else t.dtype for t in given]
    z_at, signs_at = address(z), address(signs)
    vectors = x.data_ptr() | (z_at or 0)
    step = step_for(
        _forward, x, index, vectors, groups, epilogue.activation, signs is not None, z is not None, *dtypes
    )  # fmt: skip
    y = torch.empty_like(x)
    cells = x.shape[0] * groups
    table = step.seed.new_empty_strided((2, cells), (cells, 1))
    made = (*given, y, table, z, signs)
    addresses += (y.data_ptr(), table.data_ptr(), z_at, signs_at)
    if step.second is step.first:
        step.first(stream, made, addresses, eps)
        return y, table, signs
    partials, counters = workspace(index, stream, step.seed, step.partials, step.counters, private)
    tensors = (*made, partials, counters, None)
    addresses += (partials.data_ptr(), counters.data_ptr(), None)
    step.first(stream, tensors, addresses, eps, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    step.second(stream, tensors, addresses, eps)
    return y, table, signs


@dataclass(frozen=True)
class _Gradients:
    """Up to three launches: the sums (or, `held`, all of dx), those of parameters over samples, and dx."""

    sums: Launch
    parameters: Launch | None
    transform: Launch | None
    held: bool
    seed: Tensor
    partials: int = 0
    counters: int = 0


def _backward(
    sizes: Sizes, groups: int, need_dx: bool, need_parameters: bool, activation: Activation,
    residual: bool, signs: bool, z: bool, *rest: Any,
) -> _Gradients:  # fmt: skip
    sizes.groups = groups
    parameters, act = None, {"ACT": activation}
    if need_parameters:
        columns, rename = (
            row_plan.column_sums(sizes.x.n, sizes.x.c, 2),
            {"first": "dweight", "second": "dbias"},
        )
        rename["partials"] = "sums"
        parameters = Launch(column_sums_kernel, columns, _BACKWARD, {}, sizes.aligned, rename=rename)
    without = [] if need_parameters else ["sums"]
    kept = "mask" if signs else "residual" if z else ""
    cells = _held(sizes, groups, 2, activation.name, kept) if need_dx else None
    if cells is not None:
        only = Launch(
            group_norm_gradients_kernel, cells, _BACKWARD, act, sizes.aligned, without=without
        )  # fmt: skip
        return _Gradients(only, parameters, None, True, sizes.seed)
    transform = None
    if need_dx:
        constants = {"NORM": _merged(sizes), "ACT": IDENTITY if residual else activation}
        rename = {"dy": "dz"} if residual else {}
        transform = sizes.mapping(gradient_transform_kernel, 2, _BACKWARD, constants, rename=rename)
    without += ["dx", "dweight", "dbias"] + ([] if need_dx else ["gradients"])
    constants = {"NORM": _merged(sizes), **act}
    step = sizes.reducing(gradient_sums_kernel, 2 + z, _BACKWARD, constants, without=without)
    return _Gradients(step.first, parameters, transform, False, sizes.seed, step.partials, step.counters)


def backward(
    x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, bias: Tensor | None,
    options: GroupNormOptions, wanted: Wanted, epilogue: Epilogue = NO_EPILOGUE, private: bool = False,
) -> Gradients:  # fmt: skip
    """bias: read where there is an activation."""
    index, stream = where(x)
    groups, (need_dx, weight_dtype, bias_dtype) = options.groups, wanted
    # saved tensors come back from their hooks in any shape of memory
    x, table = dense(x), table.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    dy = dense_like(dy, x)
    n, c = x.shape[:2]
    dx = torch.empty_like(x) if need_dx else None
    dweight = dbias = None
    if weight_dtype is not None or bias_dtype is not None:  # both come from one launch
        dweight = table.new_empty(c, dtype=weight_dtype or table.dtype)
        dbias = table.new_empty(c, dtype=bias_dtype or table.dtype)
    z, signs = epilogue.in_backward(x)
    residual = z is not None or signs is not None
    dz = torch.empty_like(x) if residual else None
    given = (x, dy, dx, weight, table, dweight, dbias, bias, z, signs, dz)
    addresses = [None if t is None else t.data_ptr() for t in given]
    dtypes = (dy.dtype, *(None if t is None else t.dtype for t in (weight, bias)), weight_dtype, bias_dtype)
    vectors = x.data_ptr() | dy.data_ptr() | table.data_ptr() | (address(z) or 0)
    step = step_for(
        _backward, x, index, vectors, groups, need_dx, dweight is not None, epilogue.activation, residual,
        signs is not None, z is not None, dtypes,
    )  # fmt: skip
    sums = None if step.parameters is None else table.new_empty((n, 2, c))
    partials = counters = gradients = None
    if not step.held:
        partials, counters = workspace(index, stream, step.seed, step.partials, step.counters, private)
        gradients = torch.empty_like(table) if need_dx else None
    made = (sums, partials, counters, gradients, None)
    tensors = (*given, *made)
    addresses += [None if t is None else t.data_ptr() for t in made]
    if step.held:
        step.sums(stream, tensors, addresses)
    else:
        step.sums(stream, tensors, addresses, x.numel() / (n * groups))
    if step.parameters is not None:
        step.parameters(stream, tensors, addresses)
    if step.transform is not None:
        step.transform(stream, tensors, addresses)
    return dx, dweight if weight_dtype else None, dbias if bias_dtype else None, dz
