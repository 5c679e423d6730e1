"""Decides whether a call runs the kernels or plain torch, from the tensor and from the state around the call
(compilation, tracing, transforms)."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)
_TRACED = ("FakeTensor", "FunctionalTensor")  # what graph capture passes
KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
OLDEST_TRITON = (3, 6)


try:
    import triton

    TRITON_VERSION: str | None = str(triton.__version__)
except ImportError:
    TRITON_VERSION = None
# Older torch builds bring older Tritons, which lack what kernels/ needs: then layers run plain torch.
TRITON = TRITON_VERSION is not None and tuple(map(int, TRITON_VERSION.split(".")[:2])) >= OLDEST_TRITON


def is_exporting() -> bool:
    """torch.compiler.is_exporting, read as a flag. Up to torch 2.11, Dynamo takes the function for True in a
    plain torch.compile too (pytorch issue 176347)."""
    return torch.compiler._is_exporting_flag


def refuse_dtensor(*tensors: torch.Tensor | None) -> None:
    """Raises TypeError for a DTensor: its statistics would span devices, and the kernels do not
    communicate."""
    for t in tensors:
        if t is not None and type(t) not in PLAIN and type(t).__name__ == "DTensor":
            raise TypeError(
                "bnfast layers compute on local tensors, and this is a DTensor. Data parallelism works "
                "with FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel: both hand "
                "local tensors to each layer."
            )


def known(x: torch.Tensor) -> bool:
    """Whether x is an ordinary tensor, whose memory holds its values, or a traced one in its place."""
    if type(x) in PLAIN:
        return not (x.is_nested or (not torch.compiler.is_compiling() and x.is_neg()))
    return type(x).__name__ in _TRACED


def carries(kind: type) -> bool:
    """Whether this subclass of Tensor is an ordinary tensor with other data beside it. It may override
    torch's functions, by __torch_function__, but not operators, by __torch_dispatch__."""
    return (
        kind not in PLAIN
        and issubclass(kind, torch.Tensor)
        and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


def ordinary(route: int, *tensors: torch.Tensor | None) -> list[Any] | None:
    """Returns these tensors as ordinary ones. None if they are ordinary already, if the first would take the
    plain-torch path as an ordinary one too, and in torch.compile, which handles __torch_function__ itself.
    route: the route of the first as it is."""
    if route == TORCH and type(tensors[0]) in PLAIN:
        return None
    subclasses = [t for t in tensors if t is not None and type(t) not in PLAIN]
    if not subclasses or torch.compiler.is_compiling() or not any(carries(type(t)) for t in subclasses):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        found: list[Any] = [
            t.as_subclass(torch.Tensor) if t is not None and carries(type(t)) else t for t in tensors
        ]
        return None if choose_route(found[0]) == TORCH else found


@functools.lru_cache
def unsuitable_gpu(index: int) -> str | None:
    """Why Triton cannot serve this CUDA device, or None."""
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or later"
    return None


def transforming() -> bool:
    """Whether a functorch transform (vmap, grad, jvp ...) or a forward-mode AD level is active. Kernels are
    opaque to both, and a mutating operator fails in them; torch's own batch_norm does not."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched(dy: torch.Tensor) -> bool:
    """Whether a gradient is a batch of gradients: torch.autograd.grad(is_grads_batched=True) uses a vmap of
    its own."""
    return not torch.compiler.is_compiling() and (
        transforming() or torch._C._functorch.is_legacy_batchedtensor(dy)
    )


def reason_for_torch(x: torch.Tensor) -> str | None:
    """Why x itself requires the plain-torch path, or None if the kernels can take it."""
    if not TRITON:
        found = f"Triton {TRITON_VERSION} is too old" if TRITON_VERSION else "Triton is not installed"
        return f"{found}: the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer"
    if not known(x) or x.layout is not torch.strided:
        return f"no kernels for {type(x).__name__} of layout {x.layout}"
    if x.dtype not in KERNEL_DTYPES:
        return f"no kernels for {x.dtype}"
    if x.is_cuda:
        return unsuitable_gpu(x.get_device())
    if x.device.type != "cpu":
        return f"no kernels for the device type {x.device.type!r}"
    return (
        None if INTERPRET else "CPU tensors run plain torch (the kernels themselves with TRITON_INTERPRET=1)"
    )


TORCH, OPERATORS, KERNELS = range(3)  # the routes

_suitable: dict[tuple[torch.dtype, torch.device, torch.layout], bool] = {}


def choose_route(x: torch.Tensor) -> int:
    """Returns what a call on x runs. TORCH: plain torch (exported and traced graphs must hold aten operators
    only). OPERATORS: the kernels as operators, because a dispatch mode or a subclass intercepts operators.
    KERNELS: the kernels themselves, which is 4 us faster.

    Every call runs this, so the usual cases come first and take as few calls as possible."""
    if torch.compiler.is_compiling():
        # without the cache: Dynamo would guard on it, and recompile for each new entry
        kernels = not (torch.jit.is_tracing() or is_exporting() or transforming())
        return OPERATORS if kernels and x.numel() > 0 and reason_for_torch(x) is None else TORCH
    if not (x.is_cuda or INTERPRET) or torch._C._is_tracing():
        return TORCH
    if type(x) in PLAIN and not (x.is_nested or x.is_neg()):
        key = (x.dtype, x.device, x.layout)
        suitable = _suitable.get(key)
        if suitable is None:
            suitable = _suitable[key] = reason_for_torch(x) is None
        watched = torch._C._len_torch_dispatch_stack() > 0
    else:
        suitable, watched = reason_for_torch(x) is None, True
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if not suitable or transformed or x.numel() == 0:
        return TORCH
    return OPERATORS if watched else KERNELS


def elsewhere(x: torch.Tensor) -> bool:
    """Whether another device than x's is the current one, which is what Triton launches on."""
    index = x.get_device()
    return index >= 0 and index != torch._C._cuda_getDevice()


def watched(x: torch.Tensor) -> bool:
    """Whether something intercepts operators. For a backward, where `choose_route` has decided the rest."""
    return type(x) not in PLAIN or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
