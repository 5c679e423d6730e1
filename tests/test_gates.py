"""What `python3 -m tests` runs where, each test once, and what it does without a C compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

import codegen
from bnfast.ptx import library
from codegen import __main__ as command
from tests.__main__ import (
    BUDGETS,
    COMPILED,
    EXECUTED,
    GPU,
    PERTURBED,
    ROOT,
    SOME_COMPILED,
    STATIC,
    WHOLE,
    Gate,
    feasible,
    no_compiler,
)  # fmt: skip

EACH_ONCE = (WHOLE, COMPILED, STATIC, BUDGETS, GPU)

COLLECT = """
import json, sys
import pytest

class Noted:
    def pytest_collection_finish(self, session):
        self.found = [(item.nodeid, [mark.name for mark in item.iter_markers()]) for item in session.items]

noted = Noted()
code = pytest.main(["tests", "--collect-only", "-qq", "-n0", "--no-header"], plugins=[noted])
with open(sys.argv[1], "w") as file:
    json.dump(noted.found, file)
sys.exit(code)
"""


@pytest.fixture
def without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for cached in (library.load, no_compiler):
        cached.cache_clear()
    yield
    for cached in (library.load, no_compiler):
        cached.cache_clear()


@pytest.mark.usefixtures("without_a_compiler")
@pytest.mark.parametrize("gate", [COMPILED, SOME_COMPILED], ids=["newest", "oldest"])
def test_without_a_compiler_the_same_tests_are_interpreted(
    gate: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    found = feasible(gate)
    assert found.interpret
    assert [*gate.selection] == sorted([*found.selection, "--compiled"], key=gate.selection.index)
    assert found.name == "compiled PTX (interpreted: no C compiler)"
    said = capsys.readouterr().out
    assert "install gcc or clang, or name one in CC" in said
    assert "run in Triton's interpreter instead" in said
    assert feasible(WHOLE) is WHOLE


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("gate", [COMPILED, EXECUTED, *PERTURBED], ids=lambda gate: gate.name)
def test_with_a_compiler_they_are_executed(gate: Gate) -> None:
    assert feasible(gate) is gate
    assert not gate.interpret


@pytest.mark.usefixtures("without_a_compiler")
def test_without_a_compiler_nothing_is_held_against_budgets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codegen, "why_not_compiled", lambda: None)
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("NOT RUN: ")
    assert "install gcc or clang, or name one in CC" in said


def holds(gate: Gate, name: str, marks: list[str]) -> bool:
    """Whether pytest, told what the gate tells it, runs a test."""
    place, *options = gate.selection
    ignored = [option.removeprefix("--ignore=") for option in options if option.startswith("--ignore=")]
    marked = Expression.compile(options[options.index("-m") + 1])
    return (
        name.startswith(place)
        and not name.startswith(tuple(ignored))
        and marked.evaluate(lambda mark, **_: mark in marks)
    )


@pytest.mark.slow
def test_every_test_is_in_one_gate(tmp_path: Path) -> None:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    file = tmp_path / "found.json"
    subprocess.run(
        [sys.executable, "-c", COLLECT, str(file)], cwd=ROOT, env=variables, check=True,
        stdout=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    found, held = json.loads(file.read_text(encoding="utf-8")), Counter[str]()
    for name, marks in found:
        gates = [gate.name for gate in EACH_ONCE if holds(gate, name, marks)]
        assert len(gates) == 1, (name, gates)
        held += Counter(gates)
    assert set(held) == {gate.name for gate in EACH_ONCE}
