"""Autograd around GroupNorm's kernels, which are InstanceNorm's too."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import KERNELS
from ..kernels import group_norm as kernels
from ..ops import groupnorm as ops
from ..reference import groupnorm as reference
from . import shared

Options = tuple[int, int, float]  # dispatch.path's answer, number of groups, eps


class GroupNorm(torch.autograd.Function):
    """Saves x, gamma, and mean and rstd of each group of each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
        y, table = run(x, weight, bias, options, True)
        ctx.save_for_backward(x, weight, table)
        ctx.fixed = (options[1:], None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*shared.gradients(ctx, grads[0], _direct, _operator, _plain), None)


def _direct(x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, *wanted: Any) -> Any:
    return kernels.backward(x, dy, table, weight, fixed[0], *wanted)


def _operator(x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, *wanted: Any) -> Any:
    return ops.backward(x, dy, table, weight, fixed[0], *wanted)


def _plain(dy: Tensor, x: Tensor, weight: Tensor | None, table: Tensor, fixed: Any) -> Any:
    return reference.group_norm_backward(dy, x, weight, *fixed)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor]:
    """The forward, without autograd: (y, table of mean and rstd, which comes by the way)."""
    way, groups, eps = options
    return (kernels.forward if way == KERNELS else ops.forward)(x, groups, weight, bias, eps)


normalize = partial(shared.normalize, GroupNorm, shared.without_functorch(GroupNorm), run)
