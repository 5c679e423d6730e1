"""Guards: the values of the block that its forward depends on. A traced forward is valid while they are
unchanged."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..modules.mixins import NormMixin
from .layers import called_as_torch_does, hooked
from .values import PLAIN, Frozen, Refusal, Same, parts_of, refuse_attributes, refuse_changing, same

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Absent:
    """The expected value where there was no such attribute."""


class Guard(NamedTuple):
    """One attribute, read on the block itself (path empty) or on a module in it. expected: the frozen value;
    for a module its class, for a tensor Tensor, for a method its function, and Absent if there was none."""

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
        if type(value) is MethodType:
            value = value.__func__
        return isinstance(self.expected, Frozen) and same(value, self.expected)


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


class Fresh(NamedTuple):
    """A module that returns a new tensor, to which the forward adds in place."""

    path: tuple[str, ...]

    @property
    def what(self) -> str:
        return ".".join(self.path)

    def holds(self, block: nn.Module) -> bool:
        return returns_new(follow(block, self.path))


Condition = Guard | Children | Shared | Inlined | Fresh


def known(module: nn.Module) -> bool:
    """Whether a module's forward is bnfast's or torch.nn's. These write to their own buffers only, unless
    they have `inplace`."""
    kind = original_class(type(module))
    theirs = kind.forward.__module__.startswith("torch.nn.") or kind.forward is NormMixin.forward
    return theirs and called_as_torch_does(kind)


def returns_new(module: nn.Module | None) -> bool:
    """Whether a module returns a tensor that nothing else holds."""
    if module is None or hooked(module) or not known(module):
        return False
    if isinstance(module, nn.Sequential) and len(module):
        return returns_new(module[-1])
    return isinstance(module, (NormMixin, nn.modules.conv._ConvNd, nn.Linear))


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


def _frozen(value: Any, name: str, inside: bool = False) -> Frozen:
    """Freezes a plain value, a function, a class of modules, or a list, tuple or dict of these. Refuses other
    objects and classes: they may hold settings, and what is read of them is not noted."""
    refuse_changing(value, name)
    kind = type(value)
    if isinstance(value, tuple) or (isinstance(value, (list, dict)) and not inside):
        refuse_attributes(value, name)
        return Frozen(kind, None, tuple([_frozen(part, name, True) for part in parts_of(value, kind)]))
    if isinstance(value, PLAIN):
        return Frozen(kind, None, value)
    modules = isinstance(value, type) and issubclass(value, nn.Module)
    if isinstance(value, (FunctionType, BuiltinFunctionType)) or value is Absent or modules:
        return Frozen(kind, Same(value), None)
    raise Refusal(f"forward reads {name}, which is or holds a {kind.__name__}")
