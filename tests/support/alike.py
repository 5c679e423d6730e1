"""Ours and torch's, raising alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def same_error(ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """Both raise, the same type with the same first line: torch's is found out by asking torch."""
    with pytest.raises(Exception) as expected:  # noqa: PT011 - which one is what is being found out
        theirs()
    with pytest.raises(expected.type) as found:
        ours()
    assert str(found.value).splitlines()[:1] == str(expected.value).splitlines()[:1]
