"""Values that a forward reads, frozen as they were, and which of them may change without a visible sign."""

from __future__ import annotations

import collections
import datetime
import enum
import functools
import logging
import operator
import random
import re
import sys
import types
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Proxy

_STDLIB = frozenset(sys.stdlib_module_names)
_OTHERS = _STDLIB | {"torch", "bnfast", "numpy"}
PLAIN = (
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
# Functions of these modules depend on the clock, the system or random numbers.
CHANGING = {
    "os", "posix", "nt", "time", "_io", "io", "uuid", "secrets", "_random", "socket", "_socket", "platform",
    "subprocess", "tempfile", "genericpath", "getpass", "locale", "pathlib",
}  # fmt: skip
_NOW = ("now", "today", "utcnow")
_NO_ATTRIBUTES = (collections.OrderedDict, collections.Counter, collections.defaultdict)  # as a rule


def of_others(module: str) -> bool:
    """Whether a module is Python's, torch's, numpy's or bnfast's, whose code is not watched."""
    return module.partition(".")[0] in _OTHERS


class Refusal(BaseException):
    """Raised where a forward cannot be traced, or a value that it reads cannot be guarded. It is not an
    Exception: a forward that catches exceptions would continue, and the trace would record its handler as the
    normal path."""


class Same:
    """An object that is compared by identity."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)

    def __repr__(self) -> str:
        return f"Same({id(self.it)})"


class Frozen(NamedTuple):
    """A value as it was when it was read. kind: its class. identity: the object, if the value must be the
    same one. content: the value itself, if that cannot change, or its frozen contents."""

    kind: Any
    identity: Same | None
    content: Any


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
        if kind in PLAIN:
            return Frozen(kind, None, value)
        if kind is types.BuiltinFunctionType:
            refuse_changing(value, name)
            return Frozen(kind, Same(value), None)
        if isinstance(value, (list, tuple, dict, set, frozenset)):
            refuse_attributes(value, name)
        within = (*around, id(value))
        parts = parts_of(value, kind)
        if parts is not None:
            return Frozen(kind, None, tuple([freeze(part, within) for part in parts]))
        if isinstance(value, (set, frozenset)) and all(type(item) in PLAIN for item in value):
            return Frozen(kind, None, frozenset(value))
        numpys = kind.__module__ == "numpy" and kind.__name__ != "ndarray"
        if isinstance(value, _KNOWN_BY_IDENTITY) or root in ("torch", "typing") or numpys:
            return Frozen(kind, Same(value), None)
        if root in _STDLIB or root == "numpy" or type(getattr(value, "__dict__", None)) is not dict:
            what = f"{name}, which is or holds a {kind.__name__}"
            raise Refusal(f"forward reads {what}, and that may change unseen")
        return Frozen(kind, Same(value), freeze(value.__dict__, within))

    return freeze(value, ())


def parts_of(value: Any, kind: Any) -> Any:
    """The values of which a value consists, in a list or tuple; None if it is compared as a whole."""
    if issubclass(kind, (list, tuple)):
        return value
    if issubclass(kind, dict):
        return [*value.keys(), *value.values()]
    if kind is types.MethodType:
        return value.__func__, value.__self__
    return (value.func, value.args, value.keywords) if kind is functools.partial else None


def put_back(held: Any, before: Any) -> None:
    """Gives a list, a dict or a set its former contents back."""
    held.clear()
    (held.extend if isinstance(held, list) else held.update)(before)


def same(value: Any, expected: Frozen) -> bool:
    """Whether a value still equals what was frozen. torch.compile traces this function, too."""
    kind, identity, content = expected
    if identity is None and value is content:  # it runs with every call, and most values are of this kind
        return True
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
    parts = parts_of(value, kind)
    if parts is None:
        return equal(value, content)
    if len(parts) != len(content):
        return False
    for part, was in zip(parts, content, strict=True):  # noqa: SIM110 - it runs with every call
        if not same(part, was):
            return False
    return True


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
