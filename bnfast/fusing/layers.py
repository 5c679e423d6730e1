"""Which modules a call may be made for in another way than by calling them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

from ..modules.drop_in import DropIn

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
)  # and subclasses: what a report speaks of


def hooked(module: nn.Module) -> bool:
    """Whether anything else runs when the module is called than its forward as its class has it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def hooked_everywhere() -> bool:
    """Whether there are hooks on the calls of all modules."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def why_not_ours(norm: nn.Module) -> str | None:
    """Why a layer's `normalize` cannot stand for a call of it, or None if it can."""
    if not isinstance(norm, DropIn):
        return f"{type(norm).__module__}.{type(norm).__name__} is no layer of bnfast"
    if type(norm).forward is not DropIn.forward:
        return f"{type(norm).__name__} has a forward of its own"
    if hooked(norm):
        return "it has hooks"
    return None if norm.activation is None else "it has an activation of its own"
