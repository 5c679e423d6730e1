"""What a forward reads from outside its inputs and its block: globals, closure variables, and attributes of
modules, classes, default arguments and other objects. A traced forward is valid while all of them are
unchanged."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .values import PLAIN, Frozen, Same, same


@dataclass(unsafe_hash=True)
class Read:
    """One value that forward's code has read. where: "global" for the variable of that name in the holder, a
    dict; "closure" for the variable whose cell the holder is; "object" for the holder itself. path: the
    attributes that lead from there to the value."""

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


def _compiled(read: Read) -> Callable[[Any], bool]:
    """Compiles the check of a read. It reads names as Python code does, which is the fastest way, and for
    which torch.compile has guards of its own."""
    kind, identity, content = read.expected
    holder = read.holder.it
    # What is compared first, for that is fast. No value is the record of itself.
    first = identity.it if identity and content is None else content if kind in PLAIN else read.expected
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
    return types.FunctionType(scope["make"](None).__code__, space, "unchanged", given, cell)
