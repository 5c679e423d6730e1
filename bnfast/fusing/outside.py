"""What a forward reads from outside its inputs and its block: globals, closure variables, and attributes of
modules, classes, default arguments and other objects. A traced forward is valid while all of them are
unchanged."""

from __future__ import annotations

import enum
import functools
import logging
import re
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Proxy

from .guards import Refusal, equal, refuse_attributes, refuse_changing

_STDLIB = frozenset(sys.stdlib_module_names)
OTHERS = _STDLIB | {"torch", "bnfast", "numpy"}  # code of these is not watched
_PLAIN = (
    bool, int, float, complex, str, bytes, range, type(None), type(...),
    torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip
# Compared by identity: their contents are read under a name of their own, or do not matter here.
_KNOWN_BY_IDENTITY = (
    type, types.ModuleType, types.FunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, property,
    enum.Enum, logging.Logger, re.Pattern, nn.Module,
)  # fmt: skip
_MOST = 1000  # the limit of items in a value, for every call compares them


class Same:
    """An object that is compared by identity."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


class Frozen(NamedTuple):
    """A value as it was when it was read. kind: its class. identity: the object, if the value must be the
    same one. content: the value itself, if that cannot change, or its frozen contents."""

    kind: Any
    identity: Same | None
    content: Any


class Read(NamedTuple):
    """One value that forward's code has read. where: "global" for the variable of that name in the holder, a
    dict; "closure" for the variable whose cell the holder is; "object" for the holder itself. path: the
    attributes that lead from there to the value."""

    where: str
    holder: Same
    name: str
    path: tuple[str, ...]
    expected: Frozen

    @property
    def what(self) -> str:
        return ".".join((self.name, *self.path))

    def owner(self) -> Any:
        """The object that has the value as the last attribute of the path; the value itself if there is no
        path."""
        found = self.holder.it
        if self.where == "global":
            found = found[self.name]
        elif self.where == "closure":
            found = found.cell_contents
        for name in self.path[:-1]:
            found = getattr(found, name)
        return found

    def holds(self) -> bool:
        try:
            value = self.owner()
            value = getattr(value, self.path[-1]) if self.path else value
        except (KeyError, ValueError, AttributeError):
            return False
        return same(value, self.expected)


def frozen(value: Any, name: str) -> Frozen:
    """Freezes a value. Raises Refusal, which names it, if it may change without a visible sign."""
    left = [_MOST]

    def freeze(value: Any, around: tuple[int, ...]) -> Frozen:
        if isinstance(value, Proxy):  # comes first, for a proxy refuses to be asked for its type
            raise Refusal(f"forward keeps a tensor in {name}")
        left[0] -= 1
        if left[0] < 0:
            raise Refusal(f"forward reads {name}, which holds more than {_MOST} values")
        kind: Any = type(value)
        root = kind.__module__.partition(".")[0]
        if isinstance(value, enum.Enum) or id(value) in around:
            return Frozen(kind, Same(value), None)
        if kind in _PLAIN:
            return Frozen(kind, None, value)
        if kind is types.BuiltinFunctionType:
            refuse_changing(value, name)
            return Frozen(kind, Same(value), None)
        if isinstance(value, (list, tuple, dict, set, frozenset)):
            refuse_attributes(value, name)
        within = (*around, id(value))
        parts = _parts(value, kind)
        if parts is not None:
            return Frozen(kind, None, tuple([freeze(part, within) for part in parts]))
        if isinstance(value, (set, frozenset)) and all(type(item) in _PLAIN for item in value):
            return Frozen(kind, None, frozenset(value))
        numpys = kind.__module__ == "numpy" and kind.__name__ != "ndarray"
        if isinstance(value, _KNOWN_BY_IDENTITY) or root in ("torch", "typing") or numpys:
            return Frozen(kind, Same(value), None)
        if root in _STDLIB or root == "numpy" or type(getattr(value, "__dict__", None)) is not dict:
            what = f"{name}, which is or holds a {kind.__name__}"
            raise Refusal(f"forward reads {what}, and that may change unseen")
        return Frozen(kind, Same(value), freeze(value.__dict__, within))

    return freeze(value, ())


def _parts(value: Any, kind: Any) -> Any:
    """The values of which a value consists, in a list or tuple; None if it is compared as a whole."""
    if issubclass(kind, (list, tuple)):
        return value
    if issubclass(kind, dict):
        return [*value.keys(), *value.values()]
    if kind is types.MethodType:
        return value.__func__, value.__self__
    return (value.func, value.args, value.keywords) if kind is functools.partial else None


def same(value: Any, expected: Frozen) -> bool:
    """Whether a value still equals what was frozen. torch.compile traces this function, too."""
    kind, identity, content = expected
    if identity is not None:
        if content is None or value is not identity.it:
            return value is identity.it
        if not torch.compiler.is_compiling():
            return same(value.__dict__, content)
        # up to torch 2.11, torch.compile cannot read an object's __dict__
        count = len(content.content) // 2
        for name, was in zip(content.content[:count], content.content[count:], strict=True):
            if not same(getattr(value, name.content), was):
                return False
        return True
    if type(value) is not kind:
        return False
    parts = _parts(value, kind)
    if parts is None:
        return equal(value, content)
    if len(parts) != len(content):
        return False
    for part, was in zip(parts, content, strict=True):  # noqa: SIM110 - it runs with every call
        if not same(part, was):
            return False
    return True


def unchanged(reads: tuple[Read, ...]) -> Callable[[], bool] | None:
    """Returns a function that says whether all reads are unchanged; None if there are none. The function
    reads names as Python code does, which is the fastest way, and for which torch.compile has guards of its
    own."""
    spaces: dict[int, list[Read]] = {}  # globals by their module; the others join the first of them
    first = next((id(read.holder.it) for read in reads if read.where == "global"), 0)
    for read in reads:
        spaces.setdefault(id(read.holder.it) if read.where == "global" else first, []).append(read)
    checks = [_compiled(group) for group in spaces.values()]
    if len(checks) < 2:
        return checks[0] if checks else None

    def all_unchanged() -> bool:
        for check in checks:  # noqa: SIM110 - it runs with every call, and all() takes longer
            if not check():
                return False
        return True

    return all_unchanged


def _compiled(reads: list[Read]) -> Callable[[], bool]:
    """Compiles the check of reads: globals of one module, and others."""
    constants: list[Any] = []
    cells: dict[str, types.CellType] = {}

    def constant(value: Any) -> str:
        constants.append(value)
        return f"_bnfast_{len(constants) - 1}"

    def condition_of(read: Read) -> str:
        name = read.name
        if read.where == "closure":
            name = f"_bnfast_cell_{id(read.holder.it)}"
            cells[name] = read.holder.it
        elif read.where == "object":
            name = constant(read.holder.it)
        value = ".".join((name, *read.path))
        kind, identity, content = read.expected
        if identity is not None and content is None:
            return f"{value} is {constant(identity.it)}"
        test = f"{constant(same)}({value}, {constant(read.expected)})"
        return f"({value} is {constant(content)} or {test})" if kind in _PLAIN else test

    condition = " and ".join(map(condition_of, reads))
    given = ", ".join(f"_bnfast_{i}" for i in range(len(constants)))
    source = f"""
def make({", ".join(cells)}):
    def unchanged({given}):
        try:
            return {condition}
        except (NameError, AttributeError):
            return False
    return unchanged
"""
    scope: dict[str, Any] = {}
    exec(source, scope)
    code = scope["make"](*cells).__code__
    space: dict[str, Any] = next((read.holder.it for read in reads if read.where == "global"), scope)
    closure = tuple(cells[name] for name in code.co_freevars)
    return types.FunctionType(code, space, "unchanged", tuple(constants), closure)
