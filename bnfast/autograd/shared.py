"""What the layers' autograd Functions have in common: when to record at all, what to save, and which way a
backward goes.

Each computes act(norm(x) + residual), and keeps x, gamma and a table of statistics in `saved_tensors`, with
beta and what the slope of the activation is found from, where there is one: the residual, or a bit for each
element (signs). In `ctx.fixed` is what its formulas need besides, the bias' dtype or None, the activation,
whether there was a residual, and the strides of x if there are signs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import KERNELS, batched, watched
from ..kernels.epilogue import IDENTITY, NO_EPILOGUE, Activation, Epilogue
from ..kernels.plan import TooLarge
from ..reference.batchnorm import wide


def without_functorch(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """Function.apply without what it does for functorch, which dispatch has ruled out where kernels are
    called directly: 4 us of 40."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def normalize(
    function: type[torch.autograd.Function],
    quick: Callable[..., Tensor],
    run: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: tuple[Any, ...],
) -> Tensor | None:
    """The output, recorded where a gradient is wanted; None where the kernels cannot after all.

    run(x, weight, bias, residual, options, keep): the forward, without autograd: (output, what to save of it,
    signs). quick: without_functorch(function). options: dispatch.path's answer, the activation, and what else
    the forward needs."""
    try:
        if not torch.is_grad_enabled() or not (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            return run(x, weight, bias, residual, options, False)[0]
        if options[0] != KERNELS:
            return function.apply(x, weight, bias, residual, options)
        if not (x.is_inference() or (weight is not None and weight.is_inference())) and (
            options[1] is None or not any(t is not None and t.is_inference() for t in (bias, residual))
        ):  # these cannot be saved
            return quick(x, weight, bias, residual, options)
    except TooLarge:
        pass
    return None


def epilogue(activation: Activation | None, residual: Tensor | None, keep: bool) -> Epilogue:
    """What the kernels are told of it. keep: for a backward."""
    if activation is None and residual is None:
        return NO_EPILOGUE
    activation = activation or IDENTITY
    return Epilogue(activation, residual, keep and activation.name == "relu")


def flat(epilogue: Epilogue) -> tuple[Any, ...]:
    """As operators take it."""
    return *epilogue.activation, epilogue.residual, epilogue.mask


def checked(made: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an operator returns, in which an empty tensor stands for no signs."""
    y, table, signs = made
    return y, table, signs if signs.numel() else None


def save(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, table: Tensor,
    signs: Tensor | None, activation: Activation | None, fixed: Any,
) -> None:  # fmt: skip
    bias_dtype = None if bias is None else bias.dtype
    if activation is None:
        ctx.fixed = (fixed, bias_dtype, None, residual is not None, None)
        ctx.save_for_backward(x, weight, table)
    else:
        order = None if signs is None else x.stride()
        ctx.fixed = (fixed, bias_dtype, activation, residual is not None, order)
        ctx.save_for_backward(x, weight, table, bias, residual if signs is None else signs)


def gradients(
    ctx: Any, dy: Tensor, direct: Callable[..., Any], operator: Callable[..., Any], plain: Callable[..., Any],
    normalized: Callable[..., Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dweight, dbias, dresidual), None where not needed.

    direct, operator: the kernels' backward, (x, dy, table, weight, what is fixed, need_dx, dtypes of
    dweight and dbias or None, bias, Epilogue). plain: (dy, x, weight, table, what is fixed), differentiable,
    for create_graph=True, for a vmap over the backward, and where dy is too much for the kernels (huge, and
    without whole vectors). normalized: (x, weight, bias, table, what is fixed), likewise, what the
    activation was applied to but for the residual."""
    x, weight, table, *rest = ctx.saved_tensors
    bias, kept = rest or (None, None)
    fixed, bias_dtype, activation, residual, order = ctx.fixed
    if order is not None and x.stride() != order:  # after hooks of saved tensors: signs are in x's old order
        x = x.new_empty_strided(x.shape, order).copy_(x)
    need_dx, need_dweight, need_dbias, need_dz = ctx.needs_input_grad[:4]
    weight_dtype = weight.dtype if need_dweight else None
    bias_dtype = bias_dtype if need_dbias else None
    dz = dy if residual and activation is None else None
    found: Any = None
    if not (torch.is_grad_enabled() or batched(dy)):
        wanted = (need_dx, weight_dtype, bias_dtype, bias)
        epilogue = NO_EPILOGUE if activation is None else Epilogue(activation, kept)
        if activation is None and not (need_dx or need_dweight or need_dbias):
            found = (None, None, None, None)
        elif watched(x) or type(dy) is not Tensor:
            found = operator(x, dy, table, weight, fixed, *wanted, epilogue)
        else:
            with contextlib.suppress(TooLarge):
                found = direct(x, dy, table, weight, fixed, *wanted, epilogue)
    if found is None:
        g = dy
        if activation is not None:
            g = _before_activation(dy, x, kept, activation, normalized, (weight, bias, table, fixed))
        dx, dweight, dbias = plain(g, x, weight, table, fixed)
        found = (dx, dweight.to(weight_dtype or dx.dtype), dbias.to(bias_dtype or dx.dtype), g.to(dy.dtype))
    dx, dweight, dbias, made = found
    needed = zip(
        (need_dx, need_dweight, need_dbias, need_dz),
        (dx, dweight, dbias, made if dz is None else dz),
        strict=True,
    )
    return tuple(gradient if need else None for need, gradient in needed)


def _before_activation(
    dy: Tensor, x: Tensor, kept: Tensor | None, activation: Activation, normalized: Callable[..., Tensor],
    rest: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """The gradient of what the activation was applied to, differentiable, and wide."""
    if kept is not None and kept.dtype == torch.uint8:
        bits = (kept[:, None] >> torch.arange(8, device=x.device, dtype=torch.uint8)) & 1
        return wide(dy) * bits.flatten().as_strided(x.shape, x.stride())
    v = normalized(x, *rest)
    return wide(dy) * activation.slope(v if kept is None else v + wide(kept))
