"""Watches the code that runs while a forward is traced, instruction by instruction, and records what it reads
from outside its inputs and its block."""

from __future__ import annotations

import builtins
import contextlib
import copy
import gc
import sys
import types
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.fx import Proxy

from .guards import Read, original_class
from .instructions import ATTRIBUTE, Place, at
from .values import CHANGING, Refusal, Same, frozen, of_others, put_back, refuse_changing

Reads = dict[tuple[object, ...], Read]

_TELL_ALL = ("globals", "vars", "eval", "exec", "__import__")
_HOLDERS = (types.ModuleType, type, nn.Module)  # their attributes are followed one by one


@contextlib.contextmanager
def watched(reads: Reads) -> Iterator[None]:
    """Within, what watched code reads is recorded in `reads` with its first value.

    Raises Refusal at the end if a value may change without a visible sign, if the code has written to one, or
    if it asks for types: it would find subclasses of classes, and symbols in place of tensors."""
    watch = _Watch(reads)
    before, collecting = sys.gettrace(), gc.isenabled()
    gc.disable()  # its callbacks and finalizers may run at any time, and are not the forward's code
    sys.settrace(watch.enter)
    try:
        yield
    finally:
        sys.settrace(before)
        if collecting:
            gc.enable()
        written = watch.put_back()
    if watch.refusal is not None:
        raise watch.refusal
    if written is not None:
        raise Refusal(f"forward writes to {written}")


def _foreign(frame: FrameType | None) -> bool:
    """Whether a frame runs code that is not watched. Imports are not: torch imports some of its modules when
    they are first needed."""
    module = frame.f_globals.get("__name__", "") if frame is not None else "torch"
    return of_others(module) or module.startswith("namedtuple_") or _importing(frame)


def _importing(frame: FrameType | None) -> bool:
    """Whether a frame runs for an import within the forward."""
    while frame is not None and not (module := frame.f_globals.get("__name__", "")).startswith("bnfast."):
        if module == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


class _Watch:
    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.refusal: Refusal | None = None
        self.codes: dict[int, CodeType] = {}
        self.functions: dict[CodeType, list[types.FunctionType]] = {}
        self.values: dict[tuple[object, ...], Any] = {}  # by the keys of reads
        self.copies: list[tuple[Any, Any]] = []  # lists, dicts and sets with their former contents

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if _foreign(frame):
            if frame.f_globals.get("__name__") in CHANGING and not _foreign(frame.f_back):
                self._guarded(self._refuse_call, frame)
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.codes[id(frame.f_code)] = frame.f_code
        self._guarded(self._note_defaults, frame)
        return self.step

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self._guarded(self._note, frame)
        return self.step

    def _guarded(self, note: Callable[[FrameType], None], frame: FrameType) -> None:
        """Records an instruction. An exception from here ends the watch and appears in the forward, before
        the instruction runs. The forward may catch it, so it is kept as well."""
        if self.refusal is None:
            try:
                note(frame)
            except Refusal as why:
                self.refusal = why
            except Exception as why:
                self.refusal = Refusal(f"what forward reads cannot be told: {type(why).__name__}: {why}")
            if self.refusal is not None:
                raise self.refusal

    def _refuse_call(self, frame: FrameType) -> None:
        name = f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"
        raise Refusal(f"forward calls {name}, whose answer may change")

    def _note(self, frame: FrameType) -> None:
        code = frame.f_code
        place = at(code, frame.f_lasti)
        if place is None:
            return
        op, name = place.op, place.name
        free = name in code.co_freevars and name != "__class__"
        if op == "LOAD_GLOBAL":
            self._note_global(frame, place)
        elif op == "LOAD_DEREF" and free:
            for cell in self._cells(frame, name):
                self._note_chain("closure", cell, name, frame.f_locals[name], place)
        elif op.startswith("LOAD_FAST"):
            self._note_local(frame, place)
        elif op in ATTRIBUTE and name == "__class__":
            raise Refusal(f"{code.co_name} asks for the type of something")
        elif op == "IMPORT_FROM":
            module = place.imported_from(frame.f_globals.get("__package__") or "")
            self._note_import(sys.modules[module], name)
        elif op in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
            op == "STORE_DEREF" and free and self._cells(frame, name)
        ):
            raise Refusal(f"forward writes to {name}")

    def _note_global(self, frame: FrameType, place: Place) -> None:
        name = place.name
        if name in frame.f_globals:
            self._note_chain("global", frame.f_globals, name, frame.f_globals[name], place)
            return
        if not hasattr(builtins, name):
            raise Refusal(f"forward reads {name}, which is not defined")
        value = getattr(builtins, name)
        if value is type:
            raise Refusal(f"{frame.f_code.co_name} asks for the type of something")
        if value is callable:  # a symbol is callable, and a tensor is not
            raise Refusal(f"{frame.f_code.co_name} asks whether something is callable")
        refuse_changing(value, name)
        if name in _TELL_ALL:
            raise Refusal(f"forward calls {name}, which tells of more than can be guarded")
        if value in (setattr, delattr):
            raise Refusal(f"forward calls {name}, and what that writes to cannot be told")
        if value is super:
            self._note_super(frame, place.super_attribute())

    def _note_local(self, frame: FrameType, place: Place) -> None:
        """Records a module or a class under a local name: `cls` of a class method, or an import in a
        function."""
        value = frame.f_locals.get(place.name)
        if isinstance(value, Proxy):  # comes first, for a proxy refuses to be asked for its type
            return
        if isinstance(value, type):
            value = original_class(value)
        if isinstance(value, (types.ModuleType, type)):
            self._note_chain("object", value, value.__name__, value, place)
        elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            refuse_changing(value, value.__name__)
        else:
            self._note_class_of(value, next(place.attributes(), None))

    def _note_class_of(self, it: Any, name: str | None) -> None:
        """Records an attribute that an object has from its class."""
        kind: Any = type(it)
        if name is None or isinstance(it, _HOLDERS) or of_others(kind.__module__):
            return
        owner = next((c for c in kind.__mro__ if name in vars(c)), None)
        if owner is not None and name not in getattr(it, "__dict__", ()):
            self._note_of(owner, name)

    def _note_of(self, holder: Any, name: str) -> None:
        """Records an attribute of a module or a class."""
        self._add("object", holder, holder.__name__, (name,), getattr(holder, name))

    def _note_import(self, module: types.ModuleType, name: str) -> None:
        refuse_changing(getattr(module, name, None), name)
        if hasattr(module, name) and not of_others(module.__name__):
            self._note_of(module, name)

    def _note_super(self, frame: FrameType, name: str | None) -> None:
        """Records super().name as an attribute of the class that has it."""
        cls, this = frame.f_locals.get("__class__"), frame.f_locals.get((*frame.f_code.co_varnames, "")[0])
        if name is None or cls is None:
            return
        kind = original_class(this if isinstance(this, type) else type(this))
        after = kind.__mro__[kind.__mro__.index(cls) + 1 :] if cls in kind.__mro__ else ()
        owner = next((c for c in after if name in vars(c)), None)
        if owner is not None and not of_others(owner.__module__):
            self._note_of(owner, name)

    def _note_chain(self, where: str, holder: Any, name: str, value: Any, place: Place) -> None:
        """Follows attributes of modules and classes to the value that is finally read, and records it."""
        root: Any = value
        path: tuple[str, ...] = ()
        outside = isinstance(root, types.ModuleType) and of_others(root.__name__)
        asked = place.asked_by_name()
        if asked and isinstance(root, _HOLDERS) and not outside and not hasattr(root, asked[0] or ""):
            raise Refusal(f"forward asks {name} for {asked[0] or 'an attribute by a name that it computes'}")
        for step in asked or place.attributes():
            if (
                step is None
                or not isinstance(value, (*_HOLDERS, types.FunctionType))
                or not hasattr(value, step)
            ):
                self._note_class_of(value, step)
                break
            value, path = getattr(value, step), (*path, step)
        refuse_changing(value, ".".join((name, *path)))
        sets = place.sets()
        if sets is not None and isinstance(value, (types.ModuleType, type, types.FunctionType)):
            raise Refusal(f"forward writes to {'.'.join((name, *path, sets))}")
        if outside and not isinstance(value, (bool, int, float, str, list, dict, set)):
            path, value = (), root  # functions and classes of these modules do not change
        if where != "object" or path:
            self._add(where, holder, name, path, value)

    def _add(self, where: str, holder: Any, name: str, path: tuple[str, ...], value: Any) -> None:
        key = (where, id(holder), name, path)
        if key not in self.reads:
            self.reads[key] = Read(where, Same(holder), name, path, frozen(value, ".".join((name, *path))))
        if key not in self.values:
            self.values[key] = value
            held = value if isinstance(value, (list, dict, set)) else getattr(value, "__dict__", None)
            if isinstance(held, (list, dict, set)) and not isinstance(value, (types.FunctionType, *_HOLDERS)):
                self.copies.append((held, copy.copy(held)))

    def _note_defaults(self, frame: FrameType) -> None:
        """Records default arguments that are objects which may change."""
        code = frame.f_code
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            value = frame.f_locals.get(name)
            if isinstance(value, (Proxy, *_HOLDERS, types.FunctionType)):
                continue
            if type(value) not in (list, dict, set) and not hasattr(value, "__dict__"):
                continue
            for function in self._functions(code):
                defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
                if any(value is default for default in defaults):
                    self._add("object", value, f"{function.__name__}'s default {name}", (), value)
                    break

    def _cells(self, frame: FrameType, name: str) -> list[types.CellType]:
        """The cells of a variable of an enclosing function; none if that function runs within forward
        itself."""
        code, value = frame.f_code, frame.f_locals[name]
        while True:
            around = next((c for c in self.codes.values() if any(x is code for x in c.co_consts)), None)
            if around is None:
                break
            if name in around.co_cellvars:
                return []
            code = around
        found = [(f.__closure__ or ())[code.co_freevars.index(name)] for f in self._functions(code)]
        cells = [cell for cell in found if cell.cell_contents is value]
        if not cells:
            raise Refusal(f"forward reads {name}, a variable of a function around it that cannot be found")
        return cells

    def _functions(self, code: CodeType) -> list[types.FunctionType]:
        if code not in self.functions:
            users = gc.get_referrers(code)
            self.functions[code] = [f for f in users if type(f) is types.FunctionType and f.__code__ is code]
        return self.functions[code]

    def put_back(self) -> str | None:
        """Restores everything that watched code has written. Returns the name of one such value, or None."""
        written = [key for key in self.values if not self.reads[key].holds(None)]
        for held, before in self.copies:
            put_back(held, before)
        for key in written:
            if self.reads[key].path:
                self.reads[key].put_back(self.values[key])
        return self.reads[written[0]].what if written else None
