"""Autograd around LayerNorm's kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import KERNELS
from ..kernels import layer_norm as kernels
from ..ops import layernorm as ops
from ..reference import layernorm as reference
from . import shared

Options = tuple[int, int, float]  # dispatch.path's answer, number of normalized dimensions, eps


class LayerNorm(torch.autograd.Function):
    """Saves x, gamma, and mean and rstd of each row."""

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
    return kernels.backward(x, dy, weight, table, fixed[0], *wanted)


def _operator(x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, *wanted: Any) -> Any:
    return ops.backward(x, dy, weight, table, fixed[0], *wanted)


def _plain(dy: Tensor, x: Tensor, weight: Tensor | None, table: Tensor, fixed: Any) -> Any:
    return reference.layer_norm_backward(dy, x, weight, *fixed)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor]:
    """The forward, without autograd: (y, table of mean and rstd if `keep`)."""
    way, dims, eps = options
    return (kernels.forward if way == KERNELS else ops.forward)(x, weight, bias, dims, eps, keep)


normalize = partial(shared.normalize, LayerNorm, shared.without_functorch(LayerNorm), run)
