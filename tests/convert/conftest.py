"""A fixture of these tests, which a file uses with `pytestmark`."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tests.support.convertible import STAND_INS


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of tests.support.convertible are found where other libraries have theirs, whether these are
    installed or not."""
    for kind in STAND_INS:
        place = kind.__module__
        for module in (place.split(".")[0], place):  # pickle asks for the first one too
            if module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, ModuleType(module))
        monkeypatch.setattr(sys.modules[place], kind.__qualname__, kind, raising=False)
