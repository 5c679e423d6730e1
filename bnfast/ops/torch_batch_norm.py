"""F.batch_norm as the layers need it: it counts the batch, takes Batch Renormalization, and has right
gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import is_exporting, refuse_dtensor, transforming
from ..kernels.layouts import dense, format_in_batch_norm, ordered
from ..kernels.records import NO_BUFFERS
from ..reference.batchnorm import moments
from ..reference.batchrenorm import batch_renorm
from .arguments import flat, seen_as_graph, wants_gradient
from .op import Call

# raises torch's ValueError if a channel has a single value
verify_batch_size: Callable[[torch.Size], None] = getattr(F, "_verify_batch_size")  # noqa: B009


def _verify_renormalized(x: Tensor, vectors: dict[str, Tensor | None]) -> None:
    """Raises for what F.batch_norm would refuse, and plain formulas would broadcast."""
    if not (x.is_floating_point() and x.dtype.itemsize > 1):
        raise TypeError(f"batch_renorm takes floating point input of 16 bits or more, but got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"batch_renorm takes input of 2 or more dimensions, but got {x.dim()}")
    verify_batch_size(x.size())
    for name, t in vectors.items():
        if t is None:
            continue
        if t.shape != x.shape[1:2]:
            raise RuntimeError(f"{name} should be of shape [{x.shape[1]}], but got {list(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"{name} should be of floating point, but got {t.dtype}")
        writable = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not t.is_inference()
        if name.startswith("running") and not writable:
            raise RuntimeError(
                f"Inplace update to inference tensor outside InferenceMode is not allowed: {name} is one"
            )


def torch_batch_norm(call: Call) -> Tensor:
    """F.batch_norm. A batch that it refuses changes neither the counter nor the statistics."""
    x, weight, bias = call.x, call.weight, call.bias
    running_mean, running_var, batches = call.buffers
    training, momentum, eps, renorm = call.options
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    refuse_dtensor(x, *vectors.values())
    device = x.device
    for name, t in vectors.items():
        # torch raises this after it has updated the statistics
        if isinstance(t, Tensor) and t.device != device:
            raise RuntimeError(
                f"Tensor on device {t.device} is not on the expected device {device}! "
                f"({name}, beside the input)"
            )
    if renorm is not None and running_mean is not None and running_var is not None:
        order = ("running_mean", "running_var", "weight", "bias")
        _verify_renormalized(x, {name: vectors[name] for name in order})
        return batch_renorm(x, running_mean, running_var, weight, bias, momentum, eps, renorm, batches)
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if training and not watched and isinstance(bias, Tensor) and bias.dtype != x.dtype == torch.float32:
        # torch raises for these dtypes after the update too; this call without statistics raises before it.
        F.batch_norm(torch.ones(2, bias.numel(), device=x.device), None, None, weight, bias, True)
    if momentum is None and training and batches is not None and watched:
        return _cumulative(call, batches)
    if batches is not None:
        if not watched and batches.is_inference():
            batches.add_(0)  # outside inference mode it raises, as add_(1) would, but that adds before
        batches.add_(1)  # before batch_norm, as in torch: checkpointing may stop a recomputation within it
    if watched:
        return _batch_norm(call, 0.0 if momentum is None else momentum)
    try:
        if momentum is None:
            momentum = 1.0 / float(batches) if training and batches is not None else 0.0
        return _batch_norm(call, momentum)
    except (RuntimeError, ValueError, TypeError, IndexError):
        if batches is not None:
            batches.sub_(1)
        raise


def _batch_norm(call: Call, momentum: float) -> Tensor:
    """F.batch_norm with right gradients: for memory formats (see `flat`), and for statistics that change
    before the backward, to which torch hands them again. Graphs that are kept are not changed, because
    other tools look in them for batch_norm after a convolution."""
    x, weight, bias, _, _, (training, _, eps, _), (mean, variance, _) = call
    rest = (weight, bias, training, momentum, eps)
    recorded, graph = wants_gradient(x, weight, bias), seen_as_graph()
    if not (recorded or graph) or (graph and _kept()):
        return F.batch_norm(x, mean, variance, *rest)
    written: tuple[Tensor, Tensor] | None = None
    if recorded and isinstance(mean, Tensor) and isinstance(variance, Tensor):
        if not training:
            mean, variance = mean.clone(), variance.clone()
        elif not (
            (graph and (torch.compiler.is_compiling() or transforming()))  # there torch sees them change too
            or mean.requires_grad
            or variance.requires_grad
            or mean.is_inference()  # torch raises
            or variance.is_inference()
        ):
            # the same memory, but torch's backward, which does not read it, does not see it change
            written = (mean, variance)
            mean, variance = mean.data, variance.data
    shape = x.shape
    planes = len(shape) > 3 and 1 in shape
    if planes and ((graph and transforming()) or x.is_contiguous()):
        if training and x.numel() == shape[1]:
            verify_batch_size(shape)
        y = F.batch_norm(flat(x), mean, variance, *rest).view_as(x)  # quicker than view(shape)
    else:
        if planes and dense(x) is x:  # channels_last: in strides that are not contiguous ones too
            x = ordered(x, format_in_batch_norm)
        y = F.batch_norm(x, mean, variance, *rest)
    if written is not None:
        torch.autograd.graph.increment_version(written)  # others may have saved them
    return y


def _kept() -> bool:
    """Whether this call is recorded in a graph that is kept, or autograd is off."""
    return not torch.is_grad_enabled() or torch.jit.is_tracing() or is_exporting()


def _cumulative(call: Call, batches: Tensor) -> Tensor:
    """momentum=None without reading the counter on the host, so that a compiled graph stays whole."""
    x, (running_mean, running_var, _) = call.x, call.buffers
    y = _batch_norm(call._replace(buffers=NO_BUFFERS), 0.0)
    with torch.no_grad():
        mean, variance = moments(x)
        n = x.numel() / x.shape[1]
        factor = (batches + 1).reciprocal()
        for running, value in ((running_mean, mean), (running_var, variance * (n / (n - 1)))):
            if running is not None:
                running.lerp_(value.to(running.dtype), factor.to(running.dtype))
        batches.add_(1)
    return y
