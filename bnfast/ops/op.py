"""The way of every call: check, choose a route, run it on the kernels, as operators or in plain torch, and
record it for autograd. A normalizer provides a Norm: what its kernels can take, and its forward and
backward on each route.

Every normalizer computes act(norm(x) + residual). Its forward returns y and stats, a table of statistics; its
backward takes x, gamma, beta and stats. A backward saves x, gamma and stats, and with an activation also beta
and the residual or relu's mask, from which the slope is found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..dispatch import KERNELS, TORCH, batched, choose_route, elsewhere, ordinary, watched
from ..kernels.epilogue import IDENTITY, MASKS, NO_EPILOGUE, Activation, Epilogue
from ..kernels.plan import TooLarge
from ..kernels.records import NO_BUFFERS, Buffers, Forward, Gradients, Wanted, new
from ..reference.batchnorm import wide
from .arguments import check_residual, followed_by, residual_fits


class Call(NamedTuple):
    """The arguments of a call. options: the normalizer's, as its kernels take them."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    activation: Activation | None
    options: Any
    buffers: Buffers = NO_BUFFERS

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.residual, *self.buffers

    def holding(self, tensors: Any) -> Call:
        """The same call with other tensors."""
        x, weight, bias, residual, *buffers = tensors
        return Call(x, weight, bias, residual, self.activation, self.options, tuple(buffers))


class Kernels(NamedTuple):
    """A normalizer's kernels, and its operators with the same signatures: forward(x, weight, bias, buffers,
    options, epilogue, keep) and backward(x, dy, stats, weight, bias, options, wanted, epilogue). keep:
    whether a backward will follow."""

    forward: Callable[..., Forward]
    backward: Callable[..., Gradients]
    operator: Callable[..., Forward]
    operator_backward: Callable[..., Gradients]


def _none(*_: Any) -> Any:
    raise AssertionError("without Triton, dispatch.choose_route chooses plain torch")


NO_KERNELS = Kernels(_none, _none, _none, _none)


@dataclass(frozen=True, eq=False)
class Norm:
    """What a normalizer provides.

    accept(route, call): x in a memory order that the kernels take, or None if they cannot take the call: it
    goes to torch, which raises its own errors. plain(call): the call in plain torch, without the epilogue.

    reference(x, weight, bias, stats, options) is the normalized value that the epilogue is applied to, and
    reference_backward(dy, x, weight, stats, options) its gradients, both in plain torch and differentiable.
    function: the autograd Function that records the kernels (see `record`)."""

    accept: Callable[[int, Call], Tensor | None]
    plain: Callable[[Call], Tensor]
    kernels: Kernels
    reference: Callable[..., Tensor]
    reference_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    function: type[torch.autograd.Function]
    then: Callable[[Call, int], None] | None = None  # runs after the kernels, with the route

    @cached_property
    def quick_apply(self) -> Any:
        """function.apply without its support of functorch, which takes 4 us of 40, and which dispatch has
        ruled out where the kernels are called directly."""
        return super(torch.autograd.Function, self.function).apply  # type: ignore[misc]


def run(call: Call, norm: Norm) -> Tensor:
    """act(norm(x) + residual)."""
    x, residual = call.x, call.residual
    if residual is not None:
        check_residual(x, residual)
    route = choose_route(x)
    if route == KERNELS and elsewhere(x):
        with torch.cuda.device(x.device):
            return run(call, norm)
    if route != TORCH and (residual is None or residual_fits(route, residual)):
        accepted = norm.accept(route, call)
        y = None if accepted is None else on_kernels(accepted, call, norm, route)
        if y is not None:
            return y
    tensors = call.tensors()
    bare = ordinary(route, *tensors)
    if bare is not None:
        if has_torch_function_variadic(*tensors):  # the call of a layer; functions have handled it
            return handle_torch_function(_again, tensors, *tensors, call, norm)
        return run(call.holding(bare), norm)
    return followed_by(norm.plain(call), call.activation, residual)


def _again(*given: Any) -> Tensor:
    """run, with the tensors as arguments, among which subclasses look for themselves."""
    *tensors, call, norm = given
    return run(call.holding(tensors), norm)


def on_kernels(x: Tensor, call: Call, norm: Norm, route: int) -> Tensor | None:
    """The output, recorded if a gradient is wanted; None if the kernels cannot run this call after all. x:
    the call's, in a memory order that they take."""
    _, weight, bias, residual, activation, options, buffers = call
    forward = norm.kernels.forward if route == KERNELS else norm.kernels.operator
    try:
        if not torch.is_grad_enabled() or not (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            epilogue = NO_EPILOGUE
            if activation is not None or residual is not None:
                epilogue = epilogue_of(activation, residual, False)
            y = forward(x, weight, bias, buffers, options, epilogue, False)[0]
        elif route != KERNELS:
            y = norm.function.apply(x, weight, bias, residual, (activation, options, buffers, forward))
        elif not (x.is_inference() or (weight is not None and weight.is_inference())) and (
            activation is None or not any(t is not None and t.is_inference() for t in (bias, residual))
        ):
            y = norm.quick_apply(x, weight, bias, residual, (activation, options, buffers, forward))
        else:  # inference tensors cannot be saved
            return None
    except TooLarge:
        return None
    if norm.then is not None:
        norm.then(call, route)
    return y


def epilogue_of(activation: Activation | None, residual: Tensor | None, keep: bool) -> Epilogue:
    """The kernels' Epilogue. keep: whether a backward will follow."""
    if activation is None:
        return Epilogue(IDENTITY, residual)
    return Epilogue(activation, residual, keep and activation.name == "relu")


def record(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, how: Any
) -> Tensor:
    """The forward of a normalizer's autograd Function, whose backward is `gradients`. how: the rest of the
    Call, and the forward to run."""
    activation, options, buffers, forward = how
    bias_dtype = None if bias is None else bias.dtype
    if activation is None:
        epilogue = NO_EPILOGUE if residual is None else Epilogue(IDENTITY, residual)
        y, stats, _ = forward(x, weight, bias, buffers, options, epilogue, True)
        ctx.fixed = (options, bias_dtype, None, residual is not None, None)
        ctx.save_for_backward(x, weight, stats)
    else:
        epilogue = epilogue_of(activation, residual, True)
        y, stats, mask = forward(x, weight, bias, buffers, options, epilogue, True)
        order = None if mask is None else x.stride()
        ctx.fixed = (options, bias_dtype, activation, residual is not None, order)
        ctx.save_for_backward(x, weight, stats, bias, residual if mask is None else mask)
    return y


def gradients(ctx: Any, dy: Tensor, norm: Norm) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and residual, or None if not needed, and None for how.

    They are computed in plain torch, and differentiable, with create_graph=True, for a vmap over the
    backward, and where dy is too large for the kernels (huge, and without whole vectors)."""
    x, weight, stats, *rest = ctx.saved_tensors
    bias, kept = rest or (None, None)
    options, bias_dtype, activation, residual, order = ctx.fixed
    if (
        order is not None and x.stride() != order
    ):  # a hook of saved tensors has changed it, and the mask has the old order
        x = x.new_empty_strided(x.shape, order).copy_(x)
    need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
    wanted = new(
        Wanted, (need_dx, weight.dtype if need_dweight else None, bias_dtype if need_dbias else None)
    )
    dresidual = dy if residual and activation is None else None
    found: Any = None
    if not (torch.is_grad_enabled() or batched(dy)):
        epilogue = NO_EPILOGUE if activation is None else Epilogue(activation, kept)
        arguments = (x, dy, stats, weight, bias, options, wanted, epilogue)
        if activation is None and not (need_dx or need_dweight or need_dbias):
            found = (None, None, None, None)
        elif watched(x) or type(dy) is not Tensor:
            found = norm.kernels.operator_backward(*arguments)
        else:
            with contextlib.suppress(TooLarge):
                found = _on_its_device(norm.kernels.backward, *arguments)
    if found is None:
        g = dy
        if activation is not None:
            g = wide(dy) * _slope(x, weight, bias, stats, kept, activation, options, norm)
        dx, dweight, dbias = norm.reference_backward(g, x, weight, stats, options)
        dweight, dbias = dweight.to(wanted.weight or dx.dtype), dbias.to(wanted.bias or dx.dtype)
        found = (dx, dweight, dbias, g.to(dy.dtype))
    dx, dweight, dbias, made = found
    return (
        dx if need_dx else None,
        dweight if need_dweight else None,
        dbias if need_dbias else None,
        (made if dresidual is None else dresidual) if need_dresidual else None,
        None,
    )


def _on_its_device(function: Callable[..., Gradients], x: Tensor, *rest: Any) -> Gradients:
    if elsewhere(x):
        with torch.cuda.device(x.device):
            return function(x, *rest)
    return function(x, *rest)


def _slope(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, kept: Tensor | None,
    activation: Activation, options: Any, norm: Norm,
) -> Tensor:  # fmt: skip
    """The activation's derivative, differentiable, in the accumulator's dtype."""
    if kept is not None and kept.dtype == torch.uint8:
        bits = (kept[:, None] >> torch.arange(8, device=x.device, dtype=torch.uint8)) & 1
        kept = bits.flatten()
    if kept is not None and kept.dtype in MASKS:
        return kept.as_strided(x.shape, x.stride())
    v = norm.reference(x, weight, bias, stats, options)
    return activation.slope(v if kept is None else v + wide(kept))
