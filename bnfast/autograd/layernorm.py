"""Autograd around LayerNorm's kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import KERNELS
from ..kernels import layer_norm as kernels
from ..kernels.epilogue import Activation, Epilogue
from ..ops import layernorm as ops
from ..reference import layernorm as reference
from . import shared

Options = tuple[
    int, Activation | None, int, float
]  # dispatch.path's answer, activation, number of normalized dimensions, eps


class LayerNorm(torch.autograd.Function):
    """Saves x, gamma, and mean and rstd of each row."""

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
    return kernels.backward(x, dy, weight, table, fixed[0], *wanted, bias, epilogue)


def _operator(
    x: Tensor, dy: Tensor, table: Tensor, weight: Tensor | None, fixed: Any, need_dx: bool,
    weight_dtype: Any, bias_dtype: Any, bias: Tensor | None, epilogue: Epilogue,
) -> Any:  # fmt: skip
    wanted = (need_dx, weight_dtype, bias_dtype)
    return ops.backward(
        x, dy, weight, table, fixed[0], *wanted, bias, *epilogue.activation, epilogue.residual
    )


def _plain(dy: Tensor, x: Tensor, weight: Tensor | None, table: Tensor, fixed: Any) -> Any:
    return reference.layer_norm_backward(dy, x, weight, *fixed)


def _normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, table: Tensor, fixed: Any) -> Tensor:
    return reference.layer_norm(x, weight, bias, *fixed)


def run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: Options,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The forward, without autograd: (y, table of mean and rstd if `keep`, signs)."""
    way, activation, dims, eps = options
    epilogue = shared.epilogue(activation, residual, keep)
    if way == KERNELS:
        return kernels.forward(x, weight, bias, dims, eps, keep, epilogue)
    return shared.checked(ops.forward(x, weight, bias, dims, eps, keep, *shared.flat(epilogue)))


normalize = partial(shared.normalize, LayerNorm, shared.without_functorch(LayerNorm), run)
