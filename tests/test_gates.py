"""What `python3 -m tests` runs where, and what it does without a C compiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bnfast.ptx import library
from tests.__main__ import COMPILED, EXECUTED, PERTURBED, SOME_COMPILED, WHOLE, Gate, feasible, no_compiler


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
