"""Batch Renormalization in plain torch: Ioffe 2017, arXiv 1702.03275, algorithm 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import is_exporting
from ..kernels.records import Renorm
from .batchnorm import affine, by_channel, moments, wide


def refuse_recomputation() -> None:
    """Raises RuntimeError within a backward, which is where activation checkpointing runs forwards again."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "Batch Renormalization ran forward within a backward, as activation checkpointing does to "
            "recompute: the running statistics have moved since, so its r, d and gradients would be others. "
            "Leave this layer out of the checkpointed part, or use BatchNorm there."
        )


def _before_backward(running_mean: Tensor) -> Tensor:
    refuse_recomputation()
    return running_mean.clone()


# What is compiled asks when it runs: while it is compiled there is no backward to be seen.
_library = torch.library.Library("bnfast", "FRAGMENT")
_library.define("batch_renorm_once(Tensor running_mean) -> Tensor")
_library.impl("batch_renorm_once", _before_backward, "CompositeExplicitAutograd")
torch.library.register_fake("bnfast::batch_renorm_once", torch.empty_like, lib=_library)


def limit(start: float, end: float, batches: Tensor, warmup: float, steps: float) -> Tensor:
    """`start` for the first `warmup` batches, then a straight line to `end` at batch `steps`."""
    share = ((batches - warmup) / max(steps - warmup, 1.0)).clamp(0, 1)
    share = torch.where(batches >= max(steps, warmup), torch.ones_like(share), share)
    return torch.where(share > 0, start + (end - start) * share, start)  # which may end at infinity


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    renorm: Renorm,
    batches: Tensor | None,
) -> Tensor:
    """A training step, in x's dtype. Differentiable; running statistics and counter are updated in place,
    last.

    momentum None: r = 1, d = 0 and the cumulative average. A batch without values only counts."""
    if torch.compiler.is_compiling() and not is_exporting():
        with torch.no_grad():
            old_mean = torch.ops.bnfast.batch_renorm_once(running_mean)
    else:
        old_mean = running_mean
    mean, variance = moments(x)
    sigma = (variance + eps).sqrt()
    with torch.no_grad():
        r_max, d_max, warmup, r_steps, d_steps, guarded = renorm
        old_mean, old_var = old_mean.to(mean.dtype), running_var.to(mean.dtype)
        old_sigma = (old_var + eps).sqrt()
        seen = mean.new_zeros(()) if batches is None else batches.to(mean.dtype)
        if momentum is None:
            r, d, factor = torch.ones_like(mean), torch.zeros_like(mean), 1 / (seen + 1)
        else:
            r_limit = limit(1.0, r_max, seen, warmup, r_steps)
            d_limit = limit(0.0, d_max, seen, warmup, d_steps)
            r = (sigma.detach() / old_sigma).clamp(1 / r_limit, r_limit)
            d = ((mean.detach() - old_mean) / old_sigma).clamp(-d_limit, d_limit)
            factor = torch.full_like(seen, momentum)
    y = (wide(x) - by_channel(mean, x)) * by_channel(r / sigma, x) + by_channel(d, x)
    y = affine(y, weight, bias)
    with torch.no_grad():
        new_sigma = old_sigma + factor * (sigma.detach() - old_sigma)
        new_mean = (1 - factor) * old_mean + factor * mean.detach()
        new_var = torch.where(new_sigma.square() < eps, 0.0, new_sigma.square() - eps)
        if guarded:
            finite = mean.detach().isfinite() & sigma.detach().isfinite()
            new_mean, new_var = torch.where(finite, new_mean, old_mean), torch.where(finite, new_var, old_var)
        if x.numel():
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
        if batches is not None:
            batches.add_(1)
    return y.to(x.dtype)
