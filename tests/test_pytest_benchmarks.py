"""`pytest benchmarks` works as a command of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.environment import ROOT

pytestmark = pytest.mark.slow


def test_a_case_is_timed_by_pytest_benchmark() -> None:
    chosen = "GroupNorm and (bnfast or torch or frontend)"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "-k", chosen]
    own = ("TRITON_INTERPRET", "PYTEST_")  # the outer pytest's variables say that it has workers
    variables = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "4 passed, 2 skipped" in found.stdout
    assert "test_layer[bnfast-" in found.stdout
