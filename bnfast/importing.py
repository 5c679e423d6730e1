"""What is to be done once a module has been imported, by whomever and whenever."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_LOG = logging.getLogger("bnfast")
_awaited: dict[str, Callable[[Any], None]] = {}


def when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Calls `then` with the module of this name: at once if it is imported, else right after it is."""
    if name in sys.modules:
        _do(then, sys.modules[name])
        return
    _awaited[name] = then
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _do(then: Callable[[Any], None], module: Any) -> None:
    """Another release of a library may have nothing of what is looked for: that must not stop its import."""
    try:
        then(module)
    except Exception as why:
        _LOG.warning(
            "%s, in the installed version, does not get to know bnfast's layers (%s: %s): use "
            "bnfast.revert(model) before you give it a model", module.__name__, type(why).__name__, why,
        )  # fmt: skip


class _Finder(MetaPathFinder):
    """Finds the awaited modules as the other finders do, and no other module."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in _awaited:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Finder))
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module as another loader, which is the module's own from then on."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self.own
        self.own.exec_module(module)
        _do(_awaited[module.__name__], module)
