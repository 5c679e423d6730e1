"""Fixtures of these tests, which a file uses with `pytestmark`."""

from __future__ import annotations

import pytest

from tests.support.foreign import put_in_place


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of tests.support.foreign take the place of other libraries' layers."""
    put_in_place(monkeypatch)
