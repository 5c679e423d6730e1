"""What the layers' autograd Functions have in common: when to record at all, and which way a backward goes.

Each keeps x, gamma and a table of statistics in `saved_tensors`, and in `ctx.fixed` (what its formulas need
besides, the bias' dtype or None)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import KERNELS, batched, watched
from ..kernels.plan import TooLarge


def without_functorch(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """Function.apply without what it does for functorch, which dispatch has ruled out where kernels are
    called directly: 4 us of 40."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def normalize(
    function: type[torch.autograd.Function],
    quick: Callable[..., Tensor],
    run: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: tuple[Any, ...],
) -> Tensor | None:
    """The output, recorded where a gradient is wanted; None where the kernels cannot after all.

    run(x, weight, bias, options, keep): the forward, without autograd: (output, what to save of it). quick:
    without_functorch(function). options: dispatch.path's answer, and what else the forward needs."""
    try:
        if not torch.is_grad_enabled() or not (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        ):
            return run(x, weight, bias, options, False)[0]
        if options[0] != KERNELS:
            return function.apply(x, weight, bias, options)
        if not (x.is_inference() or (weight is not None and weight.is_inference())):  # these cannot be saved
            return quick(x, weight, bias, options)
    except TooLarge:
        pass
    return None


def gradients(
    ctx: Any, dy: Tensor, direct: Callable[..., Any], operator: Callable[..., Any], plain: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias), None where not needed.

    direct, operator: the kernels' backward, (x, dy, table, weight, what is fixed, need_dx, dtypes of
    dweight and dbias or None). plain: (dy, x, weight, table, what is fixed), differentiable, for
    create_graph=True, for a vmap over the backward, and where dy is too much for the kernels (huge, and
    without whole vectors)."""
    x, weight, table = ctx.saved_tensors
    fixed, bias_dtype = ctx.fixed
    need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
    weight_dtype = weight.dtype if need_dweight else None
    bias_dtype = bias_dtype if need_dbias else None
    found = None
    if not (torch.is_grad_enabled() or batched(dy)):
        wanted = (need_dx, weight_dtype, bias_dtype)
        if watched(x) or type(dy) is not Tensor:
            found = operator(x, dy, table, weight, fixed, *wanted)
        else:
            with contextlib.suppress(TooLarge):
                found = direct(x, dy, table, weight, fixed, *wanted)
    if found is None:
        dx, dweight, dbias = plain(dy, x, weight, table, fixed)
        found = (dx, dweight.to(weight_dtype or dx.dtype), dbias.to(bias_dtype or dx.dtype))
    needed = zip((need_dx, need_dweight, need_dbias), found, strict=True)
    return tuple(gradient if need else None for need, gradient in needed)
