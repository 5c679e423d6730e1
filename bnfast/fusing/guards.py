"""What a block's forward depends on beside its inputs. A traced one holds while all of that is as it was."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import hooked

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type,
    torch.dtype, torch.device, torch.memory_format, FunctionType, BuiltinFunctionType,
)  # fmt: skip


class Unguardable(Exception):
    """Something that forward reads may change in ways that no guard sees."""


class Guard(NamedTuple):
    """One attribute, read on the block itself (path empty) or on a module in it. expected: the value, where
    that is plain, or a copy of it made by `_frozen`; for a module its class, for a tensor Tensor."""

    path: tuple[str, ...]
    name: str
    expected: Any
    keys: tuple[str, ...] | None = None  # a container's children

    def holds(self, block: nn.Module) -> bool:
        owner = follow(block, self.path) if self.path else block
        if owner is None:
            return False
        child = owner._modules.get(self.name)  # getattr comes to the same, in five times the time
        if child is not None:
            fits = isinstance(self.expected, type) and isinstance(child, self.expected)
            return fits and (self.keys is None or tuple(child._modules) == self.keys)
        value = getattr(owner, self.name, _MISSING)
        if isinstance(value, Tensor):
            return self.expected is Tensor
        if isinstance(value, dict):
            return bool(self.expected == (type(value), tuple(value.items())))
        if isinstance(value, list):
            return bool(self.expected == (type(value), tuple(value)))
        return type(value) is type(self.expected) and value == self.expected

    def put_back(self, block: nn.Module) -> bool:
        """Whether what a list or dict holds had been changed; it is as it was then."""
        value = getattr(follow(block, self.path), self.name, None)
        if not isinstance(value, (list, dict)) or self.holds(block):
            return False
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(self.expected[1])
        return True


class Inlined(NamedTuple):
    """A Sequential whose children the traced forward calls itself; path empty: the block is one."""

    path: tuple[str, ...]
    keys: tuple[str, ...]

    def holds(self, block: nn.Module) -> bool:
        module = follow(block, self.path)
        return (
            isinstance(module, nn.Sequential)
            and tuple(module._modules) == self.keys
            and original_class(type(module)).forward is nn.Sequential.forward
            and (not self.path or not hooked(module))
        )


_MISSING = object()


def follow(block: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    module: nn.Module | None = block
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def original_class(cls: type) -> Any:
    """The class that a fused block's class stands for; any other class itself."""
    return getattr(cls, "_bnfast_original", cls)


def guard(path: tuple[str, ...], name: str, value: Any) -> Guard:
    """For a value as read. Raises Unguardable for what may change and stay the same object."""
    if isinstance(value, nn.Module):
        keys = tuple(value._modules) if isinstance(value, CONTAINERS) else None
        return Guard(path, name, original_class(type(value)), keys)
    if isinstance(value, Tensor):
        return Guard(path, name, Tensor)
    return Guard(path, name, _frozen(value, ".".join((*path, name))))


def _frozen(value: Any, name: str = "") -> Any:
    """A value that stays as it is: for lists and dicts, their kind and what they hold."""
    if isinstance(value, dict):
        return type(value), tuple((key, _unchanging(item, name)) for key, item in value.items())
    if isinstance(value, list):
        return type(value), tuple(_unchanging(item, name) for item in value)
    return _unchanging(value, name)


def _unchanging(value: Any, name: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_unchanging(item, name) for item in value)
    if isinstance(value, _PLAIN):
        return value
    raise Unguardable(f"forward reads {name}, which is or holds a {type(value).__name__}")
