"""Calls a function once a module has been imported, at any time and by any code."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_LOG = logging.getLogger("bnfast")


@dataclass
class _Awaited:
    name: str
    then: Callable[[Any], None]
    done: bool = False
    told: bool = False  # whether a warning has said that it could not be done

    def do(self, module: Any) -> None:
        """Calls the function. Another release of a library may lack what the function looks for, which must
        not stop its import."""
        self.done = True
        try:
            self.then(module)
        except Exception as why:
            self.done = False
            if not self.told:
                _LOG.warning(
                    "%s, in the installed version, does not get to know bnfast's layers (%s: %s): use "
                    "bnfast.revert(model) before you give it a model", self.name, type(why).__name__, why,
                )  # fmt: skip
        else:
            if self.told:
                _LOG.info("%s gets to know bnfast's layers after all", self.name)
        self.told = not self.done


_awaited: dict[str, _Awaited] = {}


def when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Calls `then` with the module of this name: at once if it is imported, else right after it is, and again
    when it is reloaded."""
    _awaited[name] = _Awaited(name, then)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    begun = sys.modules.get(name)
    if not _is_lazy(begun) and _is_begun(begun):
        with suppress(Exception):  # the code that imports it gets the exception as well
            importlib.import_module(name)  # waits for another thread
    catch_up(name)


def catch_up(*names: str) -> None:
    """Handles modules whose import has ended since, or that were imported without the finder: these, or all
    that are awaited."""
    for name in names or list(_awaited):
        awaited, module = _awaited[name], sys.modules.get(name)
        if not (module is None or awaited.done or _is_lazy(module) or _is_begun(module)):
            awaited.do(module)


def _is_lazy(module: Any) -> bool:
    """Whether a module is importlib's, which is loaded where one of its attributes is read."""
    return type(module).__name__ == "_LazyModule"


def _is_begun(module: Any) -> bool:
    """Whether the import of a module has begun and has not ended."""
    return getattr(getattr(module, "__spec__", None), "_initializing", False) is True


class _Finder(MetaPathFinder):
    """Finds the awaited modules as the other finders do, and no other module."""

    def __init__(self) -> None:
        self._within = threading.local()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in _awaited or getattr(self._within, "asks", False):
            return None
        self._within.asks = True
        try:
            spec: Any = importlib._bootstrap._find_spec(fullname, path, target)  # type: ignore[attr-defined]
            if hasattr(getattr(spec, "loader", None), "exec_module"):
                spec.loader = _Loader(spec.loader)
        except Exception:  # the import continues without this finder, and raises it as well
            return None
        finally:
            self._within.asks = False
        return spec


class _Loader:
    """Loads a module with another loader, which becomes the module's own."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # while it is copied
            raise AttributeError(name)
        return getattr(self.own, name)

    def exec_module(self, module: Any) -> None:
        name = module.__spec__.name
        module.__loader__ = module.__spec__.loader = self.own
        self.own.exec_module(module)
        if name in _awaited:
            _awaited[name].do(module)
