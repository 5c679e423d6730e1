"""Records which attributes of the block and of its modules a forward reads while it is traced."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy

from .guards import Absent, Children, Guard, children, guard, original_class, path_of
from .layers import called_as_torch_does
from .subclassing import subclass
from .values import Refusal, put_back

Seen = dict[tuple[object, ...], Guard | Children]
_Copies = dict[tuple[object, ...], tuple[Any, Any]]  # lists and dicts by the keys of Seen, with copies

_EMPTY = torch.empty(0)  # stands for a parameter or a buffer
# attributes of torch.nn.Module itself, which every call reads
_OWN = {*vars(nn.Module()), *(name for name in dir(nn.Module) if name.startswith("__")), "forward"} - {
    "training"
}
_LISTS_CHILDREN = {"_modules", "children", "named_children"}
# Attributes that reveal modules and tensors in ways that no guard covers
_TELLS_ALL = set(vars(nn.Module())) - {"training", "_modules"} | {
    "__dict__", "parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules",
    "state_dict", "forward",
}  # fmt: skip


@contextlib.contextmanager
def observed(
    block: nn.Module, parameters: tuple[str, ...], sequences: set[nn.Module], seen: Seen
) -> Iterator[None]:
    """Within, every attribute that is read on the block and on its modules is recorded in `seen`, and the
    block's forward takes its required parameters only. sequences: Sequentials whose children have a guard
    already.

    Raises Refusal where that is impossible, or would not cover everything that is read."""
    classes: list[tuple[nn.Module, type]] = []
    copies: _Copies = {}
    try:
        for name, module in block.named_modules():
            cls = type(module)
            if issubclass(cls, torch.jit.ScriptModule):
                continue  # it is compiled, and so are its attributes
            members = _spy(cls, path_of(name), module in sequences, seen, copies)
            if not called_as_torch_does(cls):  # it is a leaf, with everything that its own __call__ does
                members["__call__"] = lambda self, *args, **kwargs: nn.Module.__call__(self, *args, **kwargs)
            members["_bnfast_original"] = original_class(cls)  # for guards, which note the classes of modules
            if module is block:
                members["forward"] = _forward_of(original_class(cls), parameters)
            try:
                object.__setattr__(module, "__class__", subclass(cls, members))
            except Exception as why:
                raise Refusal(f"{cls.__name__} ({name or 'itself'}) cannot be observed: {why}") from why
            classes.append((module, cls))
        yield
    finally:
        for module, cls in classes:
            object.__setattr__(module, "__class__", cls)
        written = [key for key in copies if not seen[key].holds(block)]
        for held, before in copies.values():
            put_back(held, before)
    if written:
        raise Refusal(f"forward writes to {seen[written[0]].what}")


def _forward_of(cls: Any, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """Wraps forward with these parameters only, for torch.fx reads the parameters from its code."""
    names = ", ".join(("self", *parameters))
    scope = {"forward": cls.forward, "__name__": __name__}
    forward: Callable[..., Any] = eval(f"lambda {names}: forward({names})", scope)
    return forward


def asked_by(depth: int) -> str:
    """The name of the module whose code runs that many calls above the caller."""
    name: str = sys._getframe(depth + 1).f_globals.get("__name__", "")
    return name


def by_torch(depth: int) -> bool:
    return asked_by(depth + 1).startswith("torch.")


def _spy(cls: Any, path: tuple[str, ...], known: bool, seen: Seen, copies: _Copies) -> dict[str, Any]:
    """The members of a subclass that records what is read on its only instance, and refuses to set
    attributes. known: whether its children have a guard already."""

    def note(module: nn.Module, name: str, value: Any) -> Any:
        kept = _EMPTY if isinstance(value, Proxy) else value
        if type(value) is MethodType and value.__self__ in (module, type(module)):
            kept = value.__func__
            if kept is getattr(nn.Module, name, None):
                return value
        if name not in _OWN and (path, name) not in seen:
            seen[path, name] = guard(path, name, kept)
        if name not in _OWN and isinstance(kept, (list, dict)):
            copies.setdefault((path, name), (kept, copy.copy(kept)))
        return value

    def __getattribute__(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if name in _TELLS_ALL and not by_torch(1):
            raise Refusal(f"forward asks for {name}")
        contained = name == "_modules" and asked_by(1) == "torch.nn.modules.container"
        if name in _LISTS_CHILDREN and (contained or not by_torch(1)) and not known:
            seen[path, "children"] = children(path, self)
        return note(self, name, value)

    def __getattr__(self: Any, name: str) -> Any:
        try:
            value = cls.__getattr__(self, name)
        except AttributeError:
            if not name.startswith("__"):
                note(self, name, Absent)
            raise
        return note(self, name, value)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        raise Refusal(f"forward sets {name}")

    return {f.__name__: f for f in (__getattribute__, __getattr__, __setattr__)}
