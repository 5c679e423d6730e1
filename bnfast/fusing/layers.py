"""Whether `normalize` may be called in place of a layer, and whether a call of a module runs its forward
only."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from ..modules.mixins import NormMixin

# these and their subclasses appear in a report
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, NormMixin)


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs anything else than the forward of its class."""
    held = module.__dict__  # this runs with every call of a fused block, and attributes take twice as long
    kind: Any = type(module)
    return bool(
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
        or "_call_impl" in held
        or held.get("_compiled_call_impl") is not None
        or kind.__call__ is not _CALL
        or kind._call_impl is not _CALL_IMPL
    )


_CALL, _CALL_IMPL = nn.Module._wrapped_call_impl, nn.Module._call_impl  # __call__ is the first


def called_as_torch_does(cls: type) -> bool:
    """Whether a class is called as torch.nn.Module implements it: its __call__ and _call_impl are torch's."""
    kind: Any = cls
    return kind.__call__ is _CALL and kind._call_impl is _CALL_IMPL


def why_not_called(module: nn.Module, name: str) -> str:
    """Why the call of a hooked module cannot be omitted. name: what the reason calls it."""
    base: Any = nn.Module
    if base.__call__ is not _CALL or base._call_impl is not _CALL_IMPL:
        return "torch.nn.Module's __call__ or _call_impl has been replaced"
    if not called_as_torch_does(type(module)):
        return f"{name} has a __call__ or a _call_impl of its own"
    return f"{name} has hooks, or a forward or a compiled call of its own"


def hooked_everywhere() -> bool:
    """Whether global hooks are registered, which run with the calls of all modules."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def why_not_ours(norm: nn.Module) -> str | None:
    """Why `normalize` cannot be called in place of a layer, or None if it can."""
    if not isinstance(norm, NormMixin):
        return f"{type(norm).__module__}.{type(norm).__name__} is no layer of bnfast"
    if type(norm).forward is not NormMixin.forward:
        return f"{type(norm).__name__} has a forward of its own"
    if hooked(norm):
        called = called_as_torch_does(type(norm))
        return why_not_called(norm, "it" if called else type(norm).__name__)
    return None if norm.activation is None else "it has an activation of its own"
