"""LayerNorm on the road of op.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import KERNEL_DTYPES, KERNELS, PLAIN, TRITON, refuse_dtensor
from ..kernels.layouts import contiguous
from ..kernels.records import LayerNormOptions
from ..reference import layernorm as reference
from . import op
from .arguments import as_float, needs_float
from .op import NO_KERNELS, Call, Norm


def layer_norm(call: Call) -> Tensor:
    """A call with LayerNormOptions, checked."""
    if type(call.options.eps) is not float:
        # integers and 0-d tensors, which torch's function takes for floats, or its TypeError
        F.layer_norm(torch.ones(1, 1), (1,), None, None, call.options.eps)
        call = call._replace(options=call.options._replace(eps=float(call.options.eps)))
    if isinstance(call.options.shape, list):  # the caller's, who may change it before the backward
        call = call._replace(options=call.options._replace(shape=tuple(call.options.shape)))
    return op.run(call, NORM)


def _supports(route: int, call: Call) -> bool:
    x, shape = call.x, call.options.shape
    if not isinstance(shape, tuple) or len(shape) == 0:  # torch.Size is a tuple
        return False
    if x.shape[-len(shape) :] != shape:
        return False
    for n in shape:
        if not isinstance(n, (int, torch.SymInt)):  # 4.0 would pass for 4
            return False
    index, cuda = x.get_device(), x.is_cuda
    for t in (call.weight, call.bias):
        if t is not None and (
            (route == KERNELS and type(t) not in PLAIN)
            or t.shape != shape  # on the path of every call: each test is 0.1 us
            or not t.is_contiguous()
            or (t.dtype is not torch.float32 and t.dtype not in KERNEL_DTYPES)
            or (t.get_device() != index or not t.is_cuda if cuda else not t.is_cpu)
        ):
            return False
    return True


def _torch(call: Call) -> Tensor:
    """torch's own layer_norm, in fp32 where its result would have another dtype than the kernels' has."""
    x, weight, bias, (shape, eps) = call.x, call.weight, call.bias, call.options
    refuse_dtensor(x, weight, bias)
    if not needs_float(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)
    return F.layer_norm(x.float(), shape, as_float(weight), as_float(bias), eps).to(x.dtype)


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, table: Tensor, options: LayerNormOptions
) -> Tensor:
    return reference.layer_norm(x, weight, bias, len(options.shape), options.eps)


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, table: Tensor, options: LayerNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.layer_norm_backward(dy, x, weight, len(options.shape), options.eps)


class LayerNorm(torch.autograd.Function):
    """Saves x, gamma, and mean and rstd of each row."""

    forward = staticmethod(op.record)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return op.gradients(ctx, grads[0], NORM)


_kernels = NO_KERNELS
if TRITON:
    from . import layer_norm_operators

    _kernels = layer_norm_operators.KERNELS

NORM = Norm(_supports, contiguous, _torch, _kernels, _reference, _reference_backward, LayerNorm)
