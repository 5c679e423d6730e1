"""The budgets of kernels: each kind of figure that got worse is named, and the file comes back as it was
written. tests/static/test_budgets.py holds the kernels themselves against it."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pandas as pd
import pytest

from bnfast import kernels
from codegen import __main__ as command
from codegen import budgets, figures
from codegen.budget_cases import CASES
from tests.__main__ import TRITONS

NAME = "BatchNorm 256x256x56x56 bf16 channels_last"
KEY = (NAME, "forward", "transform_kernel")
COMMITTED = budgets.read()
OF_KERNELS = COMMITTED[COMMITTED["host ratio"].isna()]
NOW = COMMITTED.loc[[NAME]]

FIGURES = {  # what makes each kind of figure worse
    "launches": 1, "bytes": 1, "registers 3.9.0": 1, "registers 3.6.0": 1, "KB in flight 3.7.1": -0.5,
    "bytes a load 3.8.0": -0.5,
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


def test_renewing_keeps_what_other_tritons_and_hosts_have(tmp_path: Path) -> None:
    figures_now = {"launches": 3, "bytes": 7, "registers 3.7.1": 1, "KB in flight 3.7.1": 2.0}
    figures_now["bytes a load 3.7.1"] = 3.0
    now = budgets.table(pd.DataFrame([{**dict(zip(budgets.KEY, KEY, strict=True)), **figures_now}]))
    budgets.write(tmp_path / "new.csv", budgets.renewed(now, COMMITTED))
    found = budgets.read(tmp_path / "new.csv")
    kernels = found.index.get_level_values("kernel")
    assert list(kernels[1:]) == ["host time over F.batch_norm", "host time over F.layer_norm"]
    pd.testing.assert_frame_equal(found[1:], COMMITTED[COMMITTED["host ratio"].notna()])
    expected = COMMITTED.loc[[KEY]].assign(**figures_now)
    pd.testing.assert_frame_equal(found[:1], expected, check_dtype=False)


def test_the_committed_file_is_as_it_would_be_written(tmp_path: Path) -> None:
    path = tmp_path / "again.csv"
    budgets.write(path, budgets.renewed(OF_KERNELS, COMMITTED))
    assert path.read_text(encoding="utf-8") == budgets.PATH.read_text(encoding="utf-8")


def test_each_case_and_each_kernel_has_its_lines() -> None:
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)
    assert set(OF_KERNELS.index.unique("case")) == set(names)
    assert budgets.versions(COMMITTED) == sorted(TRITONS)
    assert OF_KERNELS.drop(columns="host ratio").notna().all(axis=None)
    modules = [
        importlib.import_module(m.name) for m in pkgutil.iter_modules(kernels.__path__, "bnfast.kernels.")
    ]
    defined = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert defined == set(OF_KERNELS.index.unique("kernel"))


@pytest.mark.parametrize("newer", TRITONS[2:])
def test_loads_are_as_wide_with_every_triton(newer: str) -> None:
    """Since 3.8, what comes out of a tl.where is divisible by nothing, and loads may fall apart."""
    for older in TRITONS[:2]:
        narrower = OF_KERNELS[f"bytes a load {newer}"] < OF_KERNELS[f"bytes a load {older}"]
        assert not narrower.any(), OF_KERNELS.index[narrower]


def test_bytes_and_launches_are_as_committed() -> None:
    """In the interpreter, where there are no registers."""
    now = pd.concat([figures.lines(case, figures.of_case(case)) for case in CASES])
    assert not budgets.versions(now)
    assert budgets.changes(now, COMMITTED).empty


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("launches,bytes\n", "case"),
        ("{}\na,b,c,one,,,1,1,1\n", "one"),
        ("{}\na,b\n", "launches|non-finite"),
        ("{}\na,b,c,1,,,1,1,1\na,b,c,2,,,1,1,1\n", "more than one line"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "bad.csv"
    columns = [
        *budgets.KEY,
        "launches",
        "bytes",
        "host ratio",
        *(f"{what} 3.7.1" for what in budgets.OF_CODE),
    ]
    path.write_text(text.format(",".join(columns)))
    with pytest.raises(ValueError, match=f"bad.csv.*({match})"):
        budgets.read(path)


def test_the_table_shows_what_changed_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = OF_KERNELS[["launches", "bytes", "host ratio", *(f"{what} 3.7.1" for what in budgets.OF_CODE)]]
    now = now.drop([KEY])
    other = (NAME, "forward", "statistics_kernel")
    now.loc[other, ["launches", "registers 3.7.1"]] += [1, 6]
    command.show(now, budgets.changes(now, COMMITTED))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    was = COMMITTED.loc[other, "registers 3.7.1"]
    (line,) = (line for line in shown.partition(f"{NAME}\n")[2].splitlines()[:1])
    assert line.split()[:5] == ["forward", "statistics", "1", "->", "2"]
    assert f" {was} -> {was + 6} " in line
    assert f"{', '.join(KEY)}: launches was 1, is 0" in shown


def test_the_command_says_why_it_cannot_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    before = budgets.PATH.read_bytes()
    assert command.main(["--write"]) == 0
    assert "NOT RUN: no registers" in capsys.readouterr().out
    assert budgets.PATH.read_bytes() == before
