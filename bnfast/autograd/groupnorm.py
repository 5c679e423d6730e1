"""Autograd around GroupNorm's kernels, which are InstanceNorm's too."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import KERNELS
from ..kernels import group_norm as kernels
from ..kernels.epilogue import Activation, Epilogue
from ..ops import groupnorm as ops
from ..reference import groupnorm as reference
from . import shared

Options = tuple[
    int, Activation | None, int, float
]  # dispatch.path's answer, activation, number of groups, eps


class GroupNorm(torch.autograd.Function):
    """Saves x, gamma, and mean and rstd of each group of each sample."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        options: Options,
    ) -> Tensor:  # fmt: skip
        y, table, signs = run(x, weight, bias, residual, options, True)
        shared.save(ctx, x, weight, bias, residual, table, signs, options[1], options[2:])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*shared.gradients(ctx, grads[0], _direct, _operator, _plain, _normalized), None)


def _direct(
    x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, need_dx: bool,
    weight_dtype: Any, bias_dtype: Any, bias: Tensor | None, epilogue: Epilogue,
) -> Any:  # fmt: skip
    wanted = (need_dx, weight_dtype, bias_dtype)
    return kernels.backward(x, dy, table, weight, fixed[0], *wanted, False, bias, epilogue)


def _operator(
    x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, need_dx: bool,
    weight_dtype: Any, bias_dtype: Any, bias: Tensor | None, epilogue: Epilogue,
) -> Any:  # fmt: skip
    wanted = (need_dx, weight_dtype, bias_dtype)
    return ops.backward(
        x, dy, table, weight, fixed[0], *wanted, bias, *epilogue.activation, epilogue.residual
    )


def _plain(dy: Tensor, x: Tensor, weight: Tensor | None, table: Tensor, fixed: Any) -> Any:
    return reference.group_norm_backward(dy, x, weight, *fixed)


def _normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, table: Tensor, fixed: Any) -> Tensor:
    return reference.group_norm(x, weight, bias, *fixed)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: Options,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The forward, without autograd: (y, table of mean and rstd, which comes by the way, signs)."""
    way, activation, groups, eps = options
    epilogue = shared.epilogue(activation, residual, keep)
    if way == KERNELS:
        return kernels.forward(x, groups, weight, bias, eps, False, epilogue)
    return shared.checked(ops.forward(x, groups, weight, bias, eps, *shared.flat(epilogue)))


normalize = partial(shared.normalize, GroupNorm, shared.without_functorch(GroupNorm), run)
