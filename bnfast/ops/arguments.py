"""Checks of arguments that norms share, and helpers for their calls of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from ..dispatch import KERNEL_DTYPES, KERNELS, PLAIN, known, transforming
from ..kernels.epilogue import Activation
from ..kernels.layouts import FORMATS

_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32)


def overridden(function: Callable[..., Tensor], given: dict[str, Any], positional: int) -> Tensor:
    """What the call of a function returns where __torch_function__ of one of its arguments overrides it.
    given: the arguments by name, in order. positional: of these, the first ones that torch.nn.functional's
    function hands on by position."""
    overriding = tuple(given.values())
    args = [given.pop(name) for name in list(given)[:positional]]
    found: Tensor = handle_torch_function(function, overriding, *args, **given)
    return found


def vectors_fit(route: int, x: Tensor, channels: int, *vectors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors of one value a channel. The others go to torch, which raises
    its own errors. Every call runs this, and each test takes 0.05 us."""
    index, cuda = x.get_device(), x.is_cuda
    for t in vectors:
        if t is not None and (
            (type(t) not in PLAIN and (route == KERNELS or not known(t)))
            or t.dim() != 1
            or t.numel() != channels
            or not t.is_contiguous()
            or (t.dtype is not torch.float32 and t.dtype not in KERNEL_DTYPES)
            or (t.get_device() != index or not t.is_cuda if cuda else not t.is_cpu)
        ):
            return False
    return True


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raises TypeError or ValueError if the residual's shape, dtype or device is not the input's."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a Tensor or None, but got {type(residual).__name__}")
    for what in ("shape", "dtype", "device"):
        wanted, found = getattr(x, what), getattr(residual, what)
        if wanted != found:
            raise ValueError(f"residual must have input's {what}, {wanted}, but got {found}")


def residual_fits(route: int, residual: Tensor) -> bool:
    """Whether the kernels can take a residual that has passed check_residual."""
    return type(residual) in PLAIN or (route != KERNELS and known(residual))


def followed_by(y: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
    """act(y + residual) in plain torch."""
    if residual is not None:
        y = y + residual
    return y if activation is None else activation.apply(y)


def in_float(x: Tensor, weight: Any, bias: Any) -> tuple[Tensor, Any, Any]:
    """All three in fp32, if torch would return another dtype for half precision, or refuse it with these
    parameters. Anything but a tensor stays as it is, for torch to refuse."""
    if x.dtype in _HALVES:
        kind, dtypes = x.device.type, [t.dtype for t in (weight, bias) if isinstance(t, Tensor)]
        mixed = any(d != x.dtype for d in dtypes) and all(d in _FLOATS for d in dtypes)
        if mixed or (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            weight, bias = (t.float() if isinstance(t, Tensor) else t for t in (weight, bias))
            x = x.float()
    return x, weight, bias


def in_format_of(x: Tensor, y: Tensor, format_of: Callable[[Tensor], torch.memory_format]) -> Tensor:
    """y in the memory format that format_of gives for x, which torch does not keep everywhere. Tensors of a
    vmap cannot be asked for theirs."""
    if x.layout is not torch.strided or x.is_contiguous() or x.dim() not in FORMATS or transforming():
        return y
    return y.contiguous(memory_format=format_of(x))


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    if torch.is_grad_enabled():
        for t in tensors:
            if isinstance(t, Tensor) and t.requires_grad:
                return True
    return False


def seen_as_graph() -> bool:
    """Whether the operators of this call may run again, on tensors that require gradients, or run beneath a
    transform, whose tensors do not tell whether they do."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace the last test
        return True
    return torch._C._is_tracing() or transforming() or torch._C._len_torch_dispatch_stack() > 0


def flat(x: Tensor) -> Tensor:
    """[N, C, *] -> [N, C, S]. On a CPU, the backward of torch's batch_norm, and so of its instance_norm,
    takes channels_last memory for contiguous where sizes of 1 (instance_norm: one sample) give the gradient
    strides that fit both. In three dimensions there is no channels_last."""
    if x.dim() <= 3:
        return x
    n, c, *_ = x.shape
    return x.view(n, c, -1) if x.is_contiguous() and n * c else x.flatten(2)
