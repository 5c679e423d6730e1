"""The README's examples run, and the commands it names exist."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = sorted(set(re.findall(r"python3? -m ([\w.]+(?: \w+)?)", README)))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a reader would, in a Python of its own: this one may have Triton's interpreter on."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if importlib.util.find_spec("torchvision") is None:
        variables["PYTHONPATH"] = str(ROOT / "tests" / "support" / "stand_ins")
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


def test_examples_are_found() -> None:
    assert len(EXAMPLES) == README.count("```python")
    assert any("bnfast.BatchNorm2d" in example for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example {i}" for i in range(1, len(EXAMPLES) + 1)])
def test_example_runs(example: str) -> None:
    done = run("-W", "error::DeprecationWarning", "-c", example)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    done = run("-m", *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_the_two_commands_are_named() -> None:
    assert {"benchmarks", "tests"} <= set(COMMANDS)


def test_links_to_files_hold() -> None:
    for name in ("kernels", "bnfast", "benchmarks", "tests", "LICENSE"):
        assert name in README
        assert (ROOT / name).exists()
