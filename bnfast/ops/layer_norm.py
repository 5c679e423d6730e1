"""LayerNorm for op.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ..dispatch import KERNEL_DTYPES, KERNELS, PLAIN, TRITON, refuse_dtensor
from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.layouts import contiguous
from ..kernels.records import NO_BUFFERS, LayerNormOptions, new
from ..reference import groupnorm as reference
from . import op
from .arguments import in_float, overridden
from .op import NO_KERNELS, Call, Kernels, Norm
from .operators import Layout, Packing, backward_operator, forward_operator

_INTEGERS = (int, torch.SymInt)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Layer normalization as torch.nn.functional.layer_norm, and act(normalized + residual) with it.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each row, that is over the last dimensions, and are computed in fp32, for
    fp64 input in fp64.

    Args:
        input (Tensor): What is normalized.
        normalized_shape (sequence of int): The sizes of the last dimensions, which are normalized together.
        weight (Tensor, optional): The scale, of this shape and any floating dtype. Default: None, for 1.
        bias (Tensor, optional): The shift, of this shape and any floating dtype. Default: None, for 0.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.
        residual (Tensor, optional): What is added to the normalized values before the activation, of input's
            shape, dtype and device, in any strides. Keyword only. Default: None.

    Shape:
        - input: (*, *normalized_shape), of fp16, bf16, fp32 or fp64, in any strides.
        - residual: as input.
        - output: as input, contiguous.

    Returns:
        A contiguous tensor of input's shape and dtype, under autocast too: torch's own returns fp32 for fp16
        and bf16 input there, and takes twice the memory.

    Raises:
        RuntimeError: Shapes or devices do not match, or normalized_shape is empty, as in
            torch.nn.functional.layer_norm.
        ValueError: The activation is unknown, or the residual's shape, dtype or device differs from the
            input's.
        TypeError: The residual is not a tensor, or an argument has a type that torch refuses.

    Example:
        >>> x, shortcut = torch.randn(8, 10, 32), torch.randn(8, 10, 32)
        >>> y = bnfast.functional.layer_norm(x, (32,), activation="gelu", residual=shortcut)
        >>> torch.allclose(y, F.gelu(F.layer_norm(x, (32,)) + shortcut), atol=1e-5)
        True

    References:
        Ba, Kiros and Hinton 2016, "Layer Normalization", arXiv 1607.06450.
    """
    if has_torch_function_variadic(input, weight, bias, residual) and not torch.compiler.is_compiling():
        return overridden(layer_norm, locals(), 2)
    if not isinstance(input, Tensor):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # torch's TypeError
    activation = None if activation is None else Activation.of(activation)
    if type(eps) is not float:  # torch takes integers and 0-d tensors, and raises for others
        F.layer_norm(torch.ones(1, 1), (1,), None, None, eps)
        eps = float(eps)
    if isinstance(normalized_shape, list):  # the caller may change it before the backward
        normalized_shape = tuple(normalized_shape)
    options = new(LayerNormOptions, (normalized_shape, eps))
    return op.run(new(Call, (input, weight, bias, residual, activation, options, NO_BUFFERS)), NORM)


def _accept(route: int, call: Call) -> Tensor | None:
    x, weight, bias, _, _, (shape, _), _ = call
    if not isinstance(shape, tuple) or len(shape) == 0:  # torch.Size is a tuple
        return None
    sizes = x.shape
    first = len(sizes) - len(shape)
    for i, n in enumerate(shape, first):
        if first < 0 or sizes[i] != n or not isinstance(n, _INTEGERS):  # 4.0 would pass for 4
            return None
    index, cuda = x.get_device(), x.is_cuda
    for t in (weight, bias):
        if t is not None and (
            (route == KERNELS and type(t) not in PLAIN)
            or t.shape != shape  # on the path of every call: each test is 0.1 us
            or not t.is_contiguous()
            or (t.dtype is not torch.float32 and t.dtype not in KERNEL_DTYPES)
            or (t.get_device() != index or not t.is_cuda if cuda else not t.is_cpu)
        ):
            return None
    return x if 1 not in sizes and x.is_contiguous() else contiguous(x)


def _torch(call: Call) -> Tensor:
    """F.layer_norm, in fp32 where its result would not have the dtype that the kernels' result has."""
    x, weight, bias, (shape, eps) = call.x, call.weight, call.bias, call.options
    refuse_dtensor(x, weight, bias)
    given, weight, bias = in_float(x, weight, bias)
    y = F.layer_norm(given, shape, weight, bias, eps)
    return y if given is x else y.to(x.dtype)


class LayerNorm(torch.autograd.Function):
    """Saves x, gamma, and mean and rstd of each row."""

    forward = staticmethod(op.record)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return op.gradients(ctx, grads[0], NORM)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_kernels = NO_KERNELS
if TRITON:
    from ..kernels import layer_norm as kernels

    _layout = Layout(
        contiguous, _contiguous_like, _contiguous_like, lambda x, options: options.shape,
        lambda epilogue: epilogue.activation.name != "none", masks=False,
    )  # fmt: skip
    _packing = Packing(
        "int dims, float eps",
        lambda x, dims, eps: LayerNormOptions(x.shape[-dims:], eps),
        lambda options: (len(options.shape), options.eps),
    )
    _forward = forward_operator(
        "layer_norm", kernels.forward, _layout, _packing,
        lambda x, options, keep: (2, math.prod(x.shape[: -len(options.shape)])) if keep else (0,),
    )  # fmt: skip
    _backward = backward_operator("layer_norm_backward", kernels.backward, _layout, _packing)
    _kernels = Kernels(kernels.forward, kernels.backward, _forward, _backward)

NORM = Norm(_accept, _torch, _kernels, reference.layer_norm, reference.layer_norm_backward, LayerNorm)
