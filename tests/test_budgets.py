"""The budgets of kernels: each kind of figure that got worse is named, and the file comes back as it was
written. tests/static/test_budgets.py holds the kernels themselves against it."""

from __future__ import annotations

import csv
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bnfast import kernels
from codegen import __main__ as command
from codegen import budgets
from codegen.budget_cases import ENTRIES
from codegen.budgets import Code, Key, Line
from tests.__main__ import TRITONS

NAME = "BatchNorm 256x256x56x56 bf16 channels_last"
KEY = Key(NAME, "forward", "transform_kernel")
COMMITTED = budgets.read()
NOW = {key: line for key, line in COMMITTED.items() if key.case == NAME}


def tampered(path: Path, column: str, change: Callable[[str], str]) -> budgets.Lines:
    """The committed file with one cell of KEY's line changed, read from another place."""
    with budgets.PATH.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        if (line["case"], line["direction"], line["kernel"]) == KEY:
            line[column] = change(line[column])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return budgets.read(path)


def less(cell: str) -> str:
    return str(int(cell) - 1)


def more(cell: str) -> str:
    return f"{float(cell) + 0.5}" if "." in cell else str(int(cell) + 1)


FIGURES = {  # column: (what a budget that is too tight has there, one that is loose; the figure's name)
    "launches": (less, more, "launches"),
    "bytes": (less, more, "bytes"),
    "registers 3.9.0": (less, more, "registers (Triton 3.9.0)"),
    "registers 3.6.0": (less, more, "registers (Triton 3.6.0)"),
    "KB in flight 3.7.1": (more, lambda cell: str(float(cell) - 0.5), "KB in flight (Triton 3.7.1)"),
    "bytes a load 3.8.0": (more, lambda cell: str(float(cell) - 0.5), "bytes a load (Triton 3.8.0)"),
}


@pytest.mark.parametrize("column", FIGURES)
def test_each_figure_that_is_worse_is_named(tmp_path: Path, column: str) -> None:
    tight, _, figure = FIGURES[column]
    complaint = budgets.complaint(budgets.changes(NOW, tampered(tmp_path / "tight.csv", column, tight)))
    heading, line, renewal = complaint.splitlines()
    assert heading == "worse than in budgets.csv:"
    assert line.startswith(f"  {NAME}, forward, transform_kernel: {figure} was ")
    was, is_ = (part.replace(",", "") for part in line.partition(" was ")[2].split(", is "))
    assert float(was) != float(is_)
    assert renewal.endswith("python3 -m codegen --write")


@pytest.mark.parametrize("column", FIGURES)
def test_better_is_allowed_and_told(tmp_path: Path, column: str) -> None:
    _, loose, figure = FIGURES[column]
    (change,) = budgets.changes(NOW, tampered(tmp_path / "loose.csv", column, loose))
    assert (change.key, change.figure, change.worse) == (KEY, figure, False)
    assert budgets.complaint([change]) == ""


def test_as_committed_nothing_has_changed() -> None:
    assert len(NOW) == 4
    assert budgets.changes(NOW, COMMITTED) == []


def test_a_kernel_more_is_worse_and_one_less_is_not() -> None:
    without = {key: line for key, line in COMMITTED.items() if key != KEY}
    assert f"{KEY}: launches was 0, is 1" in budgets.complaint(budgets.changes(NOW, without))
    rest = {key: line for key, line in NOW.items() if key != KEY}
    (change,) = budgets.changes(rest, COMMITTED)
    assert (change.key, change.was, change.now, change.worse) == (KEY, 1, 0, False)


def test_registers_of_other_tritons() -> None:
    """One that the budget has no column for is not compared; one that this line lacks is worse."""
    unknown = {KEY: Line(1, COMMITTED[KEY].bytes, code={"9.0": Code(255, 1.0, 2.0)})}
    everything = {**COMMITTED, KEY: Line(1, COMMITTED[KEY].bytes)}
    assert budgets.changes(unknown, {KEY: COMMITTED[KEY]}) == []
    found = budgets.changes(NOW, everything)
    assert {(change.was, change.worse) for change in found} == {(None, True)}
    assert len(found) == len(budgets.OF_CODE) * len(TRITONS)


def test_renewing_keeps_what_other_tritons_and_hosts_have(tmp_path: Path) -> None:
    now = {KEY: Line(3, 7, code={"3.7.1": Code(1, 2.0, 3.0)})}
    lines = budgets.renewed(now, COMMITTED)
    assert lines[KEY] == Line(3, 7, code={**COMMITTED[KEY].code, "3.7.1": Code(1, 2.0, 3.0)})
    assert [key.kernel for key in lines][1:] == ["host time over F.batch_norm", "host time over F.layer_norm"]
    path = tmp_path / "new.csv"
    budgets.write(path, lines)
    assert budgets.read(path) == lines
    assert budgets.host("layer_norm", path) == budgets.host("layer_norm")


def test_the_committed_file_is_as_it_would_be_written(tmp_path: Path) -> None:
    path = tmp_path / "again.csv"
    budgets.write(path, COMMITTED)
    assert path.read_text(encoding="utf-8") == budgets.PATH.read_text(encoding="utf-8")


def test_each_entry_has_its_lines() -> None:
    names = [str(entry) for entry in ENTRIES]
    assert len(set(names)) == len(names)
    counted = {key.case for key, line in COMMITTED.items() if line.host_ratio is None}
    assert counted == set(names)
    for line in COMMITTED.values():
        assert line.host_ratio is not None or line.code.keys() == set(TRITONS)


def test_every_kernel_has_a_budget() -> None:
    modules = [
        importlib.import_module(m.name) for m in pkgutil.iter_modules(kernels.__path__, "bnfast.kernels.")
    ]
    defined = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {"statistics_kernel", "long_row_norm_kernel"} <= defined
    assert defined == {key.kernel for key, line in COMMITTED.items() if line.host_ratio is None}


@pytest.mark.parametrize("newer", TRITONS[2:])
def test_loads_are_as_wide_with_every_triton(newer: str) -> None:
    """Since 3.8, what comes out of a tl.where is divisible by nothing, and loads may fall apart."""
    for key, line in COMMITTED.items():
        for older in TRITONS[:2] if line.code else ():
            assert line.code[newer].load >= line.code[older].load, key


def test_bytes_and_launches_are_as_committed() -> None:
    """In the interpreter, where there are no registers."""
    now: budgets.Lines = {}
    for entry in ENTRIES:
        now |= command.counted(entry)
    assert not any(line.code for line in now.values())
    assert budgets.changes(now, COMMITTED) == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("case,bytes\n", "must begin with case"),
        ("{}\na,b,c,one,,,1,1,1\n", "line 2"),
        ("{}\na,b\n", "line 2"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text.format(",".join((*budgets.FIXED, *(f"{what} 3.7.1" for what in budgets.OF_CODE)))))
    with pytest.raises(ValueError, match=match):
        budgets.read(path)


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert budgets.read(tmp_path / "none.csv") == {}


# the job


def test_a_row_shows_what_changed() -> None:
    now = Line(2, 10**6, code={"3.7.1": Code(70, 40.0, 16.0)})
    budget = {KEY: Line(1, 10**6, code={"3.7.1": Code(64, 48.25, 16.0)})}
    row = command.row(KEY, now, budgets.changes({KEY: now}, budget))
    assert row == ["  forward transform", "1 -> 2", "1.0", "64 -> 70", "48.2 -> 40.0", "16.0"]


def test_the_table_fits_a_terminal_and_names_what_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    now = {
        key: Line(line.launches, line.bytes, code={"3.7.1": line.code["3.7.1"]})
        for key, line in COMMITTED.items()
        if line.host_ratio is None and key != KEY
    }
    command.show(now, budgets.changes(now, COMMITTED))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert f"{NAME}\n  forward statistics  " in shown
    assert f"{KEY}: launches was 1, is 0" in shown


def test_the_command_says_why_it_cannot_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    before = budgets.PATH.read_bytes()
    assert command.main(["--write"]) == 0
    assert "NOT RUN: no registers" in capsys.readouterr().out
    assert budgets.PATH.read_bytes() == before
