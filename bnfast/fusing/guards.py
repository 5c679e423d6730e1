"""Guards: what a forward depends on beside its inputs. A traced forward is valid while it is unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
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

    what: str
    path: tuple[str, ...]
    name: str
    expected: Any
    keys: tuple[str, ...] | None = None  # a container's children

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
    """All children of the block, or of a module in it, over which the forward iterates. kinds: their classes;
    None for a Sequential whose children the traced forward calls itself."""

    what: str
    path: tuple[str, ...]
    names: tuple[str, ...]
    kinds: tuple[type, ...] | None

    def holds(self, block: nn.Module) -> bool:
        owner = follow(block, self.path)
        if owner is None or tuple(owner._modules) != self.names:
            return False
        if self.kinds is None:
            sequential = original_class(type(owner)).forward is nn.Sequential.forward
            return sequential and not (self.path and hooked(owner))
        held = zip(owner._modules.values(), self.kinds, strict=True)
        return all(isinstance(child, kind) for child, kind in held)


class Shared(NamedTuple):
    """A module, parameter or buffer that has several names in a block: a graph knows it by one of them."""

    what: str
    names: tuple[str, ...]

    def holds(self, block: nn.Module) -> bool:
        first, *others = (_held(block, name) for name in self.names)
        return all(other is first for other in others)


class Fresh(NamedTuple):
    """A module that returns a new tensor, to which the forward adds in place."""

    what: str
    path: tuple[str, ...]

    def holds(self, block: nn.Module) -> bool:
        return returns_new(follow(block, self.path))


@dataclass(unsafe_hash=True)
class Read:
    """One value that forward's code has read from outside its inputs and its block: a variable, or an
    attribute of a module, a class, a default argument or another object. where: "global" for the variable of
    that name in the holder, a dict; "closure" for the variable whose cell the holder is; "object" for the
    holder itself. path: the attributes that lead from there to the value."""

    where: str
    holder: Same
    name: str
    path: tuple[str, ...]
    expected: Frozen
    holds: Callable[[Any], bool] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.holds = _compiled(self)

    @property
    def what(self) -> str:
        return ".".join((self.name, *self.path))

    def put_back(self, value: Any) -> None:
        """Sets the attribute that was read, the last one of the path, to its former value."""
        owner = self.holder.it
        if self.where == "global":
            owner = owner[self.name]
        elif self.where == "closure":
            owner = owner.cell_contents
        setattr(functools.reduce(getattr, self.path[:-1], owner), self.path[-1], value)


Condition = Guard | Children | Shared | Fresh | Read


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


def is_sequence(module: nn.Module) -> bool:
    """Whether the module calls its children one after another, and does nothing else."""
    kind = original_class(type(module))
    sequential = isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward
    return sequential and called_as_torch_does(kind)


def path_of(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")) if name else ()


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
    what = ".".join((*path, name))
    if isinstance(value, nn.Module):
        keys = tuple(_children(value)) if isinstance(value, CONTAINERS) else None
        return Guard(what, path, name, original_class(type(value)), keys)
    expected = Tensor if isinstance(value, Tensor) else _frozen(value, what)
    return Guard(what, path, name, expected)


def children(path: tuple[str, ...], module: nn.Module, inlined: bool = False) -> Children:
    held = _children(module)
    kinds = None if inlined else tuple(original_class(type(child)) for child in held.values())
    return Children(".".join((*path, "children")), path, tuple(held), kinds)


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Reads the children without the module's __getattribute__, which may record what is read."""
    held: dict[str, nn.Module] = object.__getattribute__(module, "_modules")
    return held


def _held(block: nn.Module, name: str) -> object:
    found: object = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


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


def _compiled(read: Read) -> Callable[[Any], bool]:
    """Compiles the check of a read. It reads names as Python code does, which is the fastest way, and for
    which torch.compile has guards of its own."""
    kind, identity, content = read.expected
    holder = read.holder.it
    first = content if kind in PLAIN else read.expected  # is compared first; no value is its own record
    if identity is not None and content is None:
        first = identity.it
    name = {"global": read.name, "closure": "_bnfast_cell", "object": "_bnfast_holder"}[read.where]
    value = ".".join((name, *read.path))
    source = f"""
def make(_bnfast_cell):
    def unchanged(_bnfast_block, _bnfast_holder, _bnfast_first, _bnfast_expected, _bnfast_same):
        try:
            return {value} is _bnfast_first or _bnfast_same({value}, _bnfast_expected)
        except (NameError, AttributeError):
            return False
    return unchanged
"""
    scope: dict[str, Any] = {}
    exec(source, scope)
    given = holder if read.where == "object" else None, first, read.expected, same
    cell = (holder,) if read.where == "closure" else ()
    space = holder if read.where == "global" else scope
    return FunctionType(scope["make"](None).__code__, space, "unchanged", given, cell)
