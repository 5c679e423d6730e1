"""Guards: the values of the block that its forward depends on. A traced forward is valid while they are
unchanged."""

from __future__ import annotations

import collections
import datetime
import operator
import random
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import hooked

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PLAIN = (
    bool, int, float, complex, str, bytes, type(None),
    torch.dtype, torch.device, torch.memory_format, FunctionType,
)  # fmt: skip
# Functions of these modules depend on the clock, the system or random numbers.
CHANGING = {
    "os", "posix", "nt", "time", "_io", "io", "uuid", "secrets", "_random", "socket", "_socket", "platform",
    "subprocess", "tempfile", "genericpath", "getpass", "locale", "pathlib",
}  # fmt: skip
_NOW = ("now", "today", "utcnow")
_NO_ATTRIBUTES = (collections.OrderedDict, collections.Counter, collections.defaultdict)  # as a rule


class Refusal(BaseException):
    """Raised where a forward cannot be traced, or a value that it reads cannot be guarded. It is not an
    Exception: a forward that catches exceptions would continue, and the trace would record its handler as the
    normal path."""


class Absent:
    """The expected value where there was no such attribute."""


class Guard(NamedTuple):
    """One attribute, read on the block itself (path empty) or on a module in it. expected: the value, where
    that is plain, or a copy of it made by `_frozen`; for a module its class, for a method its function, for
    a tensor Tensor, and Absent if there was none."""

    path: tuple[str, ...]
    name: str
    expected: Any
    keys: tuple[str, ...] | None = None  # a container's children

    @property
    def what(self) -> str:
        return ".".join((*self.path, self.name))

    def holds(self, block: nn.Module) -> bool:
        owner = follow(block, self.path) if self.path else block
        if owner is None:
            return False
        value: Any = owner._modules.get(self.name)  # getattr gives the same in five times the time
        if value is None:
            value = getattr(owner, self.name, Absent)
        if isinstance(value, nn.Module):
            fits = isinstance(self.expected, type) and isinstance(value, self.expected)
            return fits and (self.keys is None or tuple(value._modules) == self.keys)
        if isinstance(value, Tensor):
            return self.expected is Tensor
        if isinstance(value, dict):
            return bool(self.expected == (type(value), tuple(value.items())))
        if isinstance(value, list):
            return bool(self.expected == (type(value), tuple(value)))
        if type(value) is MethodType:
            value = value.__func__
        return type(value) is type(self.expected) and equal(value, self.expected)

    def put_back(self, block: nn.Module) -> bool:
        """Restores the contents of a list or dict. Returns whether they had changed."""
        value = getattr(follow(block, self.path), self.name, None)
        if not isinstance(value, (list, dict)) or self.holds(block):
            return False
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(self.expected[1])
        return True


class Children(NamedTuple):
    """All children of the block, or of a module in it, over which the forward iterates. expected: their names
    and classes."""

    path: tuple[str, ...]
    expected: tuple[tuple[str, type], ...]

    @property
    def what(self) -> str:
        return ".".join((*self.path, "children"))

    def holds(self, block: nn.Module) -> bool:
        owner = follow(block, self.path)
        return (
            owner is not None
            and len(owner._modules) == len(self.expected)
            and all(
                name == expected and isinstance(child, kind)
                for (name, child), (expected, kind) in zip(owner._modules.items(), self.expected, strict=True)
            )
        )


class Shared(NamedTuple):
    """A module, parameter or buffer that has several names in a block: a graph knows it by one of them."""

    names: tuple[str, ...]

    @property
    def what(self) -> str:
        return " or ".join(self.names)

    def holds(self, block: nn.Module) -> bool:
        first, *others = (_held(block, name) for name in self.names)
        return all(other is first for other in others)


class Inlined(NamedTuple):
    """A Sequential whose children the traced forward calls itself; path empty: the block is one."""

    path: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def what(self) -> str:
        return ".".join((*self.path, "children"))

    def holds(self, block: nn.Module) -> bool:
        module = follow(block, self.path)
        return (
            isinstance(module, nn.Sequential)
            and tuple(module._modules) == self.keys
            and original_class(type(module)).forward is nn.Sequential.forward
            and (not self.path or not hooked(module))
        )


def equal(value: Any, other: Any) -> bool:
    """Whether two values of the same class are equal. 0.0 and -0.0 are not."""
    return bool(value == other and (value or not isinstance(value, float) or str(value) == str(other)))


def refuse_changing(value: Any, name: str) -> None:
    """Raises Refusal for functions and objects that depend on the clock, the system or random numbers, and
    for a builtin method of an object, whose state no guard compares."""
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        owner = getattr(value, "__self__", None)
        clock = isinstance(owner, type) and issubclass(owner, datetime.date) and value.__name__ in _NOW
        if value.__module__ in CHANGING or value.__module__ == "sys" or clock:
            raise Refusal(f"forward calls {name}, whose answer may change")
        if value.__name__.startswith("_has_torch_function"):  # torch.overrides.has_torch_function
            raise Refusal(f"forward calls {name}, which tells symbols from tensors")
        if isinstance(owner, random.Random):
            raise Refusal(f"forward calls {name}: it draws random numbers")
        if isinstance(value, BuiltinFunctionType) and not isinstance(owner, (type(None), ModuleType, type)):
            what = f"{value.__name__}, which belongs to a {type(owner).__name__}"
            raise Refusal(f"forward reads {name}, and that is {what}: it may change unseen")
    elif value is operator.attrgetter:
        raise Refusal(f"forward calls {name}, and what that reads cannot be told")
    elif type(value).__module__ in CHANGING:
        raise Refusal(f"forward reads {name}, which may change unseen")


def refuse_attributes(value: Any, name: str) -> None:
    """Raises Refusal for a list, a dict or another plain value that has attributes beside its contents."""
    held = getattr(value, "__dict__", None)
    if held or (held is not None and type(value) not in _NO_ATTRIBUTES):
        kind = f"a {type(value).__name__}"
        raise Refusal(f"forward reads {name}, which is or holds {kind}, which has attributes of its own")


Condition = Guard | Children | Shared | Inlined


def is_mode(guard: Condition) -> bool:
    """Whether a guard is for the mode, training or eval."""
    return isinstance(guard, Guard) and guard.name == "training"


def follow(block: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    module: nn.Module | None = block
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def original_class(cls: type) -> Any:
    """The class that a fused block's class stands for; any other class itself."""
    return getattr(cls, "_bnfast_original", cls)


def guard(path: tuple[str, ...], name: str, value: Any) -> Guard:
    """Makes the guard for a value that was read. Raises Refusal for an object that may change and stay the
    same object."""
    if isinstance(value, nn.Module):
        keys = tuple(_children(value)) if isinstance(value, CONTAINERS) else None
        return Guard(path, name, original_class(type(value)), keys)
    if isinstance(value, Tensor):
        return Guard(path, name, Tensor)
    return Guard(path, name, _frozen(value, ".".join((*path, name))))


def children(path: tuple[str, ...], module: nn.Module) -> Children:
    return Children(path, tuple((name, original_class(type(m))) for name, m in _children(module).items()))


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Reads the children without the module's __getattribute__, which may record what is read."""
    held: dict[str, nn.Module] = object.__getattribute__(module, "_modules")
    return held


def _held(block: nn.Module, name: str) -> object:
    *path, last = name.split(".")
    owner = follow(block, tuple(path))
    if owner is None:
        return None
    return next((d[last] for d in (owner._modules, owner._parameters, owner._buffers) if last in d), None)


def _frozen(value: Any, name: str = "") -> Any:
    """Returns a value that cannot change: for lists and dicts, their class and contents."""
    if isinstance(value, (list, dict)):
        refuse_attributes(value, name)
    if isinstance(value, dict):
        return type(value), tuple((key, _unchanging(item, name)) for key, item in value.items())
    if isinstance(value, list):
        return type(value), tuple(_unchanging(item, name) for item in value)
    return _unchanging(value, name)


def _unchanging(value: Any, name: str) -> Any:
    refuse_changing(value, name)
    if isinstance(value, tuple):
        refuse_attributes(value, name)
        for item in value:
            _unchanging(item, name)
        return value
    # A class may hold settings, but a class of modules is read to be compared
    if (
        isinstance(value, (*_PLAIN, BuiltinFunctionType))
        or value is Absent
        or (isinstance(value, type) and issubclass(value, nn.Module))
    ):
        return value
    raise Refusal(f"forward reads {name}, which is or holds a {type(value).__name__}")
