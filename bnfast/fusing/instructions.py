"""Interprets one bytecode instruction of Python from the instructions around it."""

from __future__ import annotations

import dis
import functools
import importlib.util
from collections.abc import Iterator
from itertools import dropwhile, takewhile
from types import CodeType
from typing import Any, NamedTuple

ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_SUPER_ATTRIBUTE = (*ATTRIBUTE, "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD")
_LOADS = (*ATTRIBUTE, "LOAD_GLOBAL", "LOAD_FAST", "LOAD_DEREF")
_PREFIXES = ("EXTENDED_ARG", "PRECALL")
_SILENT = ("CACHE", "PUSH_NULL", "NOP", "COPY", "DUP_TOP")


class Place(NamedTuple):
    """One instruction of a function."""

    instructions: tuple[dis.Instruction, ...]
    place: int

    @property
    def op(self) -> str:
        return self.instructions[self.place].opname

    @property
    def name(self) -> Any:
        return self.instructions[self.place].argval

    def attributes(self) -> Iterator[str]:
        """Yields the attributes that are read, one after another, on the value that this instruction
        loads."""
        return (x.argval for x in takewhile(_reads_attribute, self.instructions[self.place + 1 :]))

    def sets(self) -> str | None:
        """The attribute that is set or deleted on the value that this instruction loads."""
        after = next(dropwhile(_reads_attribute, self.instructions[self.place + 1 :]), None)
        return after.argval if after is not None and after.opname in ("STORE_ATTR", "DELETE_ATTR") else None

    def imported_from(self, package: str) -> str:
        """For IMPORT_FROM, the name of the module."""
        i = max(i for i in range(self.place) if self.instructions[i].opname == "IMPORT_NAME")
        level = self.instructions[i - 2].argval
        return importlib.util.resolve_name("." * level + self.instructions[i].argval, package)

    def asked_by_name(self) -> tuple[str | None] | None:
        """If this loads the object of a call of getattr or hasattr: a tuple of the name that is asked for, or
        (None,) if the name is not a constant."""
        before = self.instructions[self.place - 1] if self.place else None
        if before is None or before.opname != "LOAD_GLOBAL" or before.argval not in ("getattr", "hasattr"):
            return None
        name = self.instructions[self.place + 1]
        return (name.argval if isinstance(name.argval, str) and name.opname == "LOAD_CONST" else None,)

    def called(self) -> str | None:
        """For a call, the called expression as it is written; None where Python does not record its
        position."""
        start = _start(self.instructions[self.place])
        if start is None or not self.op.startswith("CALL"):
            return None
        loads = (x for x in self.instructions[: self.place] if x.opname in _LOADS and _start(x) == start)
        return ".".join(str(x.argval) for x in loads) or None

    def super_attribute(self) -> str | None:
        """The attribute that is read on a super() that begins here."""
        near = self.instructions[self.place : self.place + 8]
        return next((x.argval for x in near if x.opname in _SUPER_ATTRIBUTE), None)


def _reads_attribute(instruction: dis.Instruction) -> bool:
    return instruction.opname in ATTRIBUTE


def _start(instruction: dis.Instruction) -> tuple[int, int] | None:
    """The line and column where the expression of an instruction begins. Python 3.11 and newer record it."""
    positions = getattr(instruction, "positions", None)
    return None if positions is None or positions.lineno is None else (positions.lineno, positions.col_offset)


def at(code: CodeType, offset: int) -> Place | None:
    """The instruction at an offset; None for internal ones of Python's interpreter."""
    instructions, places = _read(code)
    index = places.get(offset)
    return None if index is None else Place(instructions, index)


@functools.lru_cache(maxsize=256)
def _read(code: CodeType) -> tuple[tuple[dis.Instruction, ...], dict[int, int]]:
    places: dict[int, int] = {}
    kept: list[dis.Instruction] = []
    prefixes: list[int] = []
    for x in dis.get_instructions(code):
        if x.opname in _PREFIXES:  # Python may report this offset in place of the next instruction's
            prefixes.append(x.offset)
        elif x.opname not in _SILENT:
            places.update(dict.fromkeys((*prefixes, x.offset), len(kept)))
            prefixes = []
            kept.append(x)
    return tuple(kept), places
