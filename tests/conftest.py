"""For all tests: bf16 in the interpreter rounds as on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _hardware_bfloat16() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from tests.support.rounding import bfloat16_to_nearest

    with bfloat16_to_nearest():
        yield
