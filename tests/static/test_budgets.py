"""The regression gate: what is counted of every kernel held against codegen/budgets.csv, and no spills. Each
kind of figure that got worse is named, and the file comes back as it was written."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest

from benchmarks import model, predict
from bnfast import dispatch
from codegen import __main__ as command
from codegen import budgets, launches
from codegen.cases import CASES, LAST, Case, layers
from tests.__main__ import TRITONS
from tests.support.kernel_calls import kernel_names

pytestmark = pytest.mark.static

COMMITTED = budgets.read()
NAME = "BatchNorm 256x256x56x56 bf16 channels_last"
KEY = (NAME, "forward", "transform_kernel")
NOW = COMMITTED.loc[[NAME]]


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_figure_is_worse_than_its_budget(case: Case) -> None:
    found = launches.of_case(case)
    changes = budgets.changes(budgets.lines(case, found), COMMITTED)
    complaint = budgets.complaint(changes)
    assert not complaint, complaint
    assert not set(changes.index.unique("figure")) & {"launches", "bytes"}, budgets.told(changes)
    for each in itertools.chain(*found.values()):
        assert each.report.spills == 0, each
    if dispatch.TRITON_VERSION not in budgets.versions(COMMITTED):
        pytest.skip(f"{budgets.PATH.name} has no registers of Triton {dispatch.TRITON_VERSION}")


FIGURES = {  # what makes each kind of figure worse
    "launches": 1, "bytes": 1, "registers 3.9.0": 1, "registers 3.6.0": 1, "KB in flight 3.7.1": -0.5,
    "bytes a load 3.8.0": -0.5, "instructions 3.9.0": 0.5, "sectors 3.6.0": 1, "wavefronts 3.7.1": 1,
    "barriers 3.8.0": 1, "round trips 3.9.0": 1,
}  # fmt: skip


@pytest.mark.parametrize("worse", [True, False], ids=["worse", "better"])
@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_that_changed_is_named_and_if_it_is_worse_refused(figure: str, worse: bool) -> None:
    now = NOW.copy()
    now.loc[KEY, figure] += FIGURES[figure] if worse else -FIGURES[figure]
    changes = budgets.changes(now, COMMITTED)
    was, is_ = (f"{lines.loc[KEY, figure]:,.12g}" for lines in (COMMITTED, now))
    change = f"{', '.join(KEY)}: {figure} was {was}, is {is_}"
    assert budgets.told(changes) == [change]
    complaint = budgets.complaint(changes).splitlines()
    assert complaint[:2] == (["worse than in budgets.csv:", f"  {change}"] if worse else [])
    assert all(line.endswith("python3 -m codegen --write") for line in complaint[2:])


def test_a_kernel_more_is_worse_and_one_less_is_not() -> None:
    more = budgets.changes(NOW, COMMITTED.drop([KEY]))
    assert f"{', '.join(KEY)}: launches was 0, is 1" in budgets.complaint(more)
    less = budgets.changes(NOW.drop([KEY]), COMMITTED)
    assert less.to_dict("index") == {(*KEY, "launches"): {"was": 1, "now": 0, "worse": False}}


def test_registers_of_other_tritons() -> None:
    """One that the budget has no column for is not compared; one that a line lacks is worse."""
    assert budgets.changes(NOW.assign(**{"registers 9.0": 255}), COMMITTED).empty
    lacking, code = COMMITTED.copy(), [name for name in COMMITTED if name.startswith(budgets.OF_CODE)]
    lacking.loc[KEY, code] = None
    changes = budgets.changes(NOW, lacking)
    assert set(changes.index) == {(*KEY, figure) for figure in code}
    assert changes["was"].isna().all()
    assert changes["worse"].all()
    assert len(code) == len(budgets.OF_CODE) * len(TRITONS)


def test_renewing_keeps_what_other_tritons_have() -> None:
    figures = {"launches": 3, "bytes": 7, "registers 3.7.1": 1, "KB in flight 3.7.1": 2.0}
    figures["bytes a load 3.7.1"] = 3.0
    now = COMMITTED.loc[[KEY], [*figures]].assign(**figures)
    expected = COMMITTED.loc[[KEY]].assign(**figures)
    pd.testing.assert_frame_equal(budgets.renewed(now, COMMITTED), expected, check_dtype=False)


def test_the_committed_file_is_as_it_would_be_written() -> None:
    text = budgets.renewed(COMMITTED, COMMITTED).to_csv(lineterminator="\n")
    assert text == budgets.PATH.read_text(encoding="utf-8")


def test_each_case_and_each_kernel_has_its_lines() -> None:
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)
    assert set(COMMITTED.index.unique("case")) == set(names)
    assert budgets.versions(COMMITTED) == sorted(TRITONS)
    assert COMMITTED.notna().all(axis=None)
    assert kernel_names() == set(COMMITTED.index.unique("kernel"))


@pytest.mark.parametrize("newer", TRITONS[2:])
def test_loads_are_as_wide_with_every_triton(newer: str) -> None:
    """Since 3.8, what comes out of a tl.where is divisible by nothing, and loads may fall apart."""
    for older in TRITONS[:2]:
        narrower = COMMITTED[f"bytes a load {newer}"] < COMMITTED[f"bytes a load {older}"]
        assert not narrower.any(), COMMITTED.index[narrower]


def test_the_table_shows_what_changed_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = COMMITTED[["launches", "bytes", *(f"{what} 3.7.1" for what in budgets.OF_CODE)]].drop([KEY])
    other = (NAME, "forward", "statistics_kernel")
    now.loc[other, ["bytes", "registers 3.7.1"]] += [10**6, 6]
    command.show(now, budgets.changes(now, COMMITTED))
    shown = capsys.readouterr().out
    table, _, _ = shown.partition(f"{NAME}, ")
    assert max(map(len, command.ABOUT.splitlines())) <= 100
    assert max(map(len, table.splitlines())) <= 100
    moved, registers = COMMITTED.loc[other, ["bytes", "registers 3.7.1"]]
    line = shown.partition(f"{NAME}\n")[2].splitlines()[0]
    assert line.split()[:4] == ["forward", "statistics", f"{moved / 1e6 + 1:.1f}*", f"{registers + 6}*"]
    assert line.count("*") == 2
    assert f"{', '.join(other)}: registers 3.7.1 was {registers}, is {registers + 6}" in shown
    assert f"{', '.join(KEY)}: launches was 1, is 0" in shown


def test_the_command_says_why_it_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnfast.kernels.launch.INTERPRET", True)
    before = budgets.PATH.read_bytes()
    assert command.main(["--write"]) == 0
    assert "NOT RUN: bytes and launches alone" in capsys.readouterr().out
    assert budgets.PATH.read_bytes() == before


@pytest.mark.usefixtures("executor")
def test_predictions() -> None:
    (case,) = layers("BatchNorm", (256, 256, 56, 56), after=["z + relu"], last=LAST)
    for record, kernel in zip(predict.records([case]), ("statistics", "gradient_sums"), strict=True):
        assert record.status == "predicted"
        assert record.ran.startswith(f"{kernel}_kernel ")
        assert record.registers is not None
        assert 32 < record.registers <= 128
        assert record.in_flight_KB is not None
        assert 40 < record.in_flight_KB < 100
        assert record.instructions is not None
        assert 25 < record.instructions < 60
        assert record.sector_MB is not None
        assert record.floor_bytes is not None
        assert 1 <= record.sector_MB * 1e6 / record.floor_bytes < 1.1
        assert (record.kwavefronts or 0) > 100
        assert (record.barriers or 0) > 10
        assert record.round_trips in range(1, 6)
        assert record.us is not None
        assert 3 < record.us - model.floor(record.floor_bytes) < 15
        assert record.versions == f"triton {dispatch.TRITON_VERSION}"
        assert "assum" in record.note
        assert "spills" not in record.note
