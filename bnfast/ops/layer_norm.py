"""LayerNorm for op.py."""

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
from .op import NO_KERNELS, Call, Kernels, Norm
from .operators import Layout, Packing, backward_operator, forward_operator

_INTEGERS = (int, torch.SymInt)


def layer_norm(call: Call) -> Tensor:
    """Checks the options of a call, LayerNormOptions, and runs it."""
    shape, eps = call.options
    if type(shape) is not tuple or type(eps) is not float:
        if type(eps) is not float:  # F.layer_norm accepts integers and 0-d tensors, or raises its TypeError
            F.layer_norm(torch.ones(1, 1), (1,), None, None, eps)
        if isinstance(shape, list):  # the caller may change it before the backward
            shape = tuple(shape)
        call = call._replace(options=LayerNormOptions(shape, float(eps)))
    return op.run(call, NORM)


def _supports(route: int, call: Call) -> bool:
    x, weight, bias, _, _, (shape, _), _ = call
    if not isinstance(shape, tuple) or len(shape) == 0:  # torch.Size is a tuple
        return False
    sizes = x.shape
    first = len(sizes) - len(shape)
    for i, n in enumerate(shape, first):
        if first < 0 or sizes[i] != n or not isinstance(n, _INTEGERS):  # 4.0 would pass for 4
            return False
    index, cuda = x.get_device(), x.is_cuda
    for t in (weight, bias):
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
    """F.layer_norm, in fp32 where its result would not have the dtype that the kernels' result has."""
    x, weight, bias, (shape, eps) = call.x, call.weight, call.bias, call.options
    refuse_dtensor(x, weight, bias)
    if not needs_float(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)
    return F.layer_norm(x.float(), shape, as_float(weight), as_float(bias), eps).to(x.dtype)


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, options: LayerNormOptions
) -> Tensor:
    return reference.layer_norm(x, weight, bias, len(options.shape), options.eps)


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, options: LayerNormOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.layer_norm_backward(dy, x, weight, len(options.shape), options.eps)


class LayerNorm(torch.autograd.Function):
    """Saves x, gamma, and mean and rstd of each row."""

    forward = staticmethod(op.record)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return op.gradients(ctx, grads[0], NORM)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor, dims: int) -> int:
    rows = 1
    for size in x.shape[:-dims]:
        rows = rows * size
    return rows


_kernels = NO_KERNELS
if TRITON:
    from ..kernels import layer_norm as kernels

    _layout = Layout(
        contiguous, _contiguous_like, _contiguous_like, lambda x, options: options.shape,
        lambda epilogue: epilogue.activation.name != "none", masks=False,
    )  # fmt: skip
    _kernels = Kernels(
        kernels.forward,
        kernels.backward,
        forward_operator(
            "layer_norm",
            kernels.forward,
            _layout,
            Packing(
                "int dims, float eps",
                lambda x, dims, eps: LayerNormOptions(x.shape[-dims:], eps),
                lambda o: (len(o.shape), o.eps),
            ),
            lambda x, options, keep: (2, _rows(x, len(options.shape))) if keep else (0,),
        ),
        backward_operator(
            "layer_norm_backward",
            kernels.backward,
            _layout,
            Packing(
                "int dims", lambda x, dims: LayerNormOptions(x.shape[-dims:], 0.0), lambda o: (len(o.shape),)
            ),
        ),
    )

NORM = Norm(_supports, contiguous, _torch, _kernels, _reference, _reference_backward, LayerNorm)
