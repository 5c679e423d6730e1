"""What a forward reads from outside its inputs and its block: globals, closure variables, and attributes of
modules, classes, default arguments and other objects. A traced forward is valid while all of them are
unchanged."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

from .values import PLAIN, Frozen, Same, same


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

    def value(self) -> Any:
        """The present value. Raises KeyError, ValueError or AttributeError if there is none."""
        found = self.holder.it
        if self.where == "global":
            found = found[self.name]
        elif self.where == "closure":
            found = found.cell_contents
        for name in self.path:
            found = getattr(found, name)
        return found

    def holds(self) -> bool:
        try:
            return same(self.value(), self.expected)
        except (KeyError, ValueError, AttributeError):
            return False


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
        return f"({value} is {constant(content)} or {test})" if kind in PLAIN else test

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
