"""One step of a case's layer: forward, backward, and the buffers that it updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules.batchrenorm import LIMITS
from .cases import Case, Given, placed

SUFFIXES = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}


def layer(case: Case, library: Any, tensors: Given) -> Any:
    """Makes bnfast's layer or torch.nn's, with these parameters, and with copies of the running
    statistics."""
    channels, eps, affine, device = case.channels, case.eps, case.affine, tensors.x.device
    module: Any
    if case.layer == "GroupNorm":
        module = library.GroupNorm(case.groups, channels, eps, affine, device=device)
    elif case.layer == "LayerNorm":
        module = library.LayerNorm(channels, eps, affine, device=device)
    else:
        options: dict[str, Any] = {"track_running_stats": case.tracked}
        if case.layer == "BatchRenorm":
            options = dict(zip(LIMITS, case.schedule, strict=True))
        kind = getattr(library, case.layer + SUFFIXES[len(case.shape)])
        module = kind(channels, eps, affine=affine, device=device, **options)
        module.momentum = case.momentum  # None is no argument of BatchRenorm's constructor
    if tensors.weight is not None:
        module.weight = nn.Parameter(tensors.weight)
        module.bias = None if tensors.bias is None else nn.Parameter(tensors.bias)
    if case.tracked:
        how = "offset" if case.storage == "offset" else "dense"
        module.running_mean = placed(tensors.running_mean.clone(), how)
        module.running_var = placed(tensors.running_var.clone(), how)
        module.num_batches_tracked.fill_(case.batches)
    return module.train(case.training)


def step(module: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Runs forward and backward. Returns the output and all gradients; running statistics stay in the
    module."""
    x = x.detach().requires_grad_()
    y = module(x)
    wanted = {"dx": x, "dweight": module.weight, "dbias": module.bias}
    wanted = {name: t for name, t in wanted.items() if t is not None}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in module.named_buffers() if t is not None}


def run(case: Case, library: Any, tensors: Given) -> dict[str, Tensor]:
    """Returns everything that one step returns and writes."""
    module = layer(case, library, tensors)
    return {**step(module, tensors.x, tensors.dy), **buffers(module)}
