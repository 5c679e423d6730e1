"""The symbols that a traced forward gets in place of tensors and of everything computed from them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Proxy
from torch.fx.proxy import Attribute

from .instructions import at
from .observing import asked_by
from .values import Refusal

# The isinstance of torch.nn.Parameter asks on behalf of its caller.
_ON_BEHALF = "torch.nn.parameter"
_ASKING = ("isinstance", "issubclass", "getattr", "hasattr", "type")
_NONE_OR_NOT = ("grad", "grad_fn", "_base")


class Symbol(Proxy):
    """A proxy that raises Refusal where a tensor has an answer, and a symbol has none or another one. Only
    torch.fx may ask whether it is a tensor, for it handles both cases."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not _by_fx(1):
            frame = sys._getframe(1)
            place = at(frame.f_code, frame.f_lasti)
            called = place.called() if place is not None else None
            asking = asked_by(1)
            who = asking if asking.partition(".")[0] == "torch" else "forward"
            if called is None or called in _ASKING:
                raise Refusal(f"{who} asks for the type of its input")
            what = "something of its input, which torch.fx does not record there"
            raise Refusal(f"{who} gives {called} {what}")
        return type(self)

    def __getattr__(self, name: str) -> Any:
        if name in _NONE_OR_NOT or (self.node.op == "placeholder" and not hasattr(Tensor, name)):
            raise Refusal(f"forward asks whether its input has {name}")
        return _Of(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not _by_fx(1):
            raise Refusal(f"forward sets {name} of a tensor")
        object.__setattr__(self, name, value)


def _by_fx(depth: int) -> bool:
    while asked_by(depth + 1) == _ON_BEHALF:
        depth += 1
    return f"{asked_by(depth + 1)}.".startswith("torch.fx.")


class _Of(Symbol, Attribute):
    """An attribute of a symbol, or its method of that name."""


def _refuses(name: str) -> None:
    def refuse(self: Symbol, *args: Any) -> Any:
        raise Refusal(f"forward needs the value of a tensor, or of something of one, for {name}")

    setattr(Symbol, name, refuse)


for _name in (
    "__int__", "__float__", "__index__", "__len__", "__contains__", "__setitem__", "__delitem__",
    "__repr__", "__str__", "__format__",
):  # fmt: skip
    _refuses(_name)


def _in_place(name: str) -> Callable[..., Any]:
    """Records `a += b` as a write in place. torch.fx records it as `a = a + b`, which differs if a has a
    second name."""
    function = getattr(operator, name)

    def write(left: Any, right: Any) -> Any:
        return function(left, right)

    def record(self: Symbol, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", write, (self, other), {})

    setattr(Symbol, f"__{name}__", record)
    return write


add_in_place = _in_place("iadd")
for _name in (
    "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift",
):  # fmt: skip
    _in_place(_name)
