"""Records, and what is made of them: CSV files, tables, pictures, comparisons, the section in docs/."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks import cases, predict, records, report, suites, tables
from benchmarks.records import CANNOT, MEASURED, PREDICTED, Record, frame
from benchmarks.session import WIDTH, as_text
from benchmarks.suites import SUITES, Network
from codegen.cases import DIRECTIONS

NETWORKS = [network for networks in SUITES.values() for network in networks]
HEADER = ",".join(records.HEADERS)
EVERY = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)


def made_up(network: Network) -> list[Record]:
    """As a run on a GPU leaves them: predictions, and bnfast's times with those of two others."""
    found = []
    for r in predict.records(cases.of_network("suite", network, torch.bfloat16, True), compiled=False):
        found.append(r)
        us = (r.floor_bytes or 0) / 4e6
        for variant, factor in (("bnfast", 1.0), ("torch", 2.0), ("compile-max", 1.5)):
            times = {name: us * factor * f for name, f in (("us", 1), ("us_low", 0.99), ("us_high", 1.01))}
            rates = {"rounds": 20, "GBps": 4000 / factor, "copy_GBps": 4400.0, "gpu": "made up"}
            who = {"status": MEASURED, "variant": variant, "ran": variant.upper(), "mode": "eager"}
            for cache in ("cold", "warm"):
                found.append(dataclasses.replace(r, **who, **times, **rates, cache=cache))
        found.append(dataclasses.replace(r, status=CANNOT, variant="cudnn-op", note="needs a GPU with cuDNN"))
    return found


# files


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    """From a folder too, whatever else lies in it; a NaN as nothing."""
    found = [*made_up(suites.UNET3D), Record("step", MEASURED, note='a "note", cut', loss_apart=math.nan)]
    (tmp_path / "folder.csv").mkdir()
    file = tmp_path / "folder.csv" / "ours.csv"
    for part in (found[:5], found[5:]):
        records.append(file, part)
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    (tmp_path / "empty.csv").touch()
    for read in (records.read(file), records.load([tmp_path]), records.load([file])):
        pd.testing.assert_frame_equal(read, frame(found), check_exact=True)


@pytest.mark.parametrize(("text", "message"), [
    ("a,b\n1,2\n", "its columns are not those of a benchmark"), ("", "its columns are not"),
    (",".join(records.HEADERS[:-1]) + "\n", "its columns are not"),
    (",".join(records.HEADERS[::-1]) + "\n", "its columns are not"), ("\udcff", "its columns are not"),
    (f"{HEADER}\n" + ",".join("x" for _ in records.HEADERS) + "\n", "it cannot be read: .*column groups"),
    (f"{HEADER}\nprobe,measured,bnf\n\n", "line 2 is too short"),
    (f"{HEADER}\n" + ("," * (len(records.HEADERS) - 1) + "\n") * 2 + "," * 99 + "\n", "line 4"),
])  # fmt: skip
def test_another_csv_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=f"a.csv: .*{message}"):
        records.read(tmp_path / "a.csv")


@pytest.mark.parametrize("rest", ["layer,measured,bnf", 'layer,"measured, bnf'])
def test_a_line_that_was_cut_off_costs_no_other(rest: str, tmp_path: Path) -> None:
    found = made_up(suites.UNET3D)
    records.append(tmp_path / "a.csv", found)
    with (tmp_path / "a.csv").open("a") as file:
        file.write(rest)
    with pytest.warns(UserWarning, match="its last line is cut off"):
        pd.testing.assert_frame_equal(records.read(tmp_path / "a.csv"), frame(found))


# tables


def test_a_table_aligns() -> None:
    assert as_text(pd.DataFrame({"a": ["xyz"], "bb": ["1"]})) == "a   bb\nxyz  1"


def lines_of(table: pd.DataFrame) -> list[str]:
    lines = as_text(table).splitlines()
    assert max(map(len, lines)) <= WIDTH
    return lines


@EVERY
def test_tables_fit_a_terminal(network: Network) -> None:
    made = made_up(network)
    found = frame(made)
    assert lines_of(tables.predicted(found))[-1].split()[:2] == ["all", str(len(network.layers))]
    for direction in DIRECTIONS:
        table = tables.measured(found, direction)
        assert lines_of(table)[-1].split()[-2:] == ["2.00", "1.50"]
        assert list(table)[-2:] == ["torch x", "compile-max x"]
        ours = [r for r in made if (r.variant, r.direction, r.cache) == ("bnfast", direction, "cold")]
        assert table["us"].iloc[-1] == f"{sum((r.us or 0) * (r.count or 0) for r in ours):.1f}"
    assert tables.refusals(found)[0].startswith("cudnn-op: needs a GPU with cuDNN")
    assert "torch: TORCH" in tables.who_ran(found)


def test_there_is_a_table_of_compiled_kernels_where_kernels_were_compiled() -> None:
    """Its last row has the most, but the least in flight, and the sum of sectors and wavefronts."""
    found = [r for r in made_up(suites.UNET3D) if r.status == PREDICTED]
    assert tables.counted(frame(found)).empty
    code = {"registers": 64, "instructions": 30.04, "sector_MB": 1.0, "kwavefronts": 2.0, "barriers": 9}
    compiled = [
        dataclasses.replace(r, **code, in_flight_KB=48.0 + n, round_trips=n) for n, r in enumerate(found)
    ]
    table = tables.counted(frame(compiled))
    lines_of(table)
    last, layers = table.iloc[-1], len(suites.UNET3D.layers)
    assert [last["regs"], last["KB in flight"], last["instr"]] == ["64/64", "48/49", "30/30"]
    assert [last["sector MB"], last["kwavefr"]] == [f"{layers}/{layers}", f"{2 * layers}/{2 * layers}"]
    assert [last["barriers"], last["trips"]] == ["9/9", f"{len(found) - 2}/{len(found) - 1}"]


def test_a_total_needs_every_layer() -> None:
    found = made_up(suites.UNET3D)
    lacking = [r for r in found if not (r.variant == "torch" and r.shape.startswith("1x96x"))]
    table = tables.measured(frame(lacking), "forward")
    assert table.iloc[-1].tolist()[-2:] == ["-", "1.50"]


def test_long_notes_are_cut() -> None:
    long = Record("probe", MEASURED, "launch gap", shape="grid of 132", us=1234567.8, note="a long note " * 9)
    table = tables.plain(frame([long, dataclasses.replace(long, note="short")]))
    lines_of(table)
    assert [text[-3:] for text in table["note"]] == ["...", "ort"]


# pictures, the report, the comparison


def options(*paths: Path) -> Any:
    return SimpleNamespace(paths=paths, out=None, top=5)


def test_report_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network has a picture, and so have predictions alone; rates have one if there are times."""
    measured, predicted = tmp_path / "measured", tmp_path / "predicted"
    for folder, status in ((measured, {PREDICTED, MEASURED, CANNOT}), (predicted, {PREDICTED})):
        folder.mkdir()
        records.append(folder / "a.csv", [r for r in made_up(suites.RESNET50) if r.status in status])
        assert report.run(options(folder), []) == 0
        text = capsys.readouterr().out
        assert "PREDICTED" in text
        assert ("MEASURED, backward" in text) == (folder == measured)
        pictures = {picture.name for picture in folder.glob("*.png")}
        assert pictures - {"roofline.png"} == {"ResNet-50-BatchNorm-bf16-channels_last.png"}
        assert ("roofline.png" in pictures) == (folder == measured)
        assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_the_columns_of_compiled_kernels_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [r for r in made_up(suites.UNET3D) if r.status == PREDICTED]
    for registers in (None, 64):
        file = tmp_path / f"{registers}.csv"
        records.append(file, [dataclasses.replace(r, registers=registers) for r in found])
        assert report.run(options(file), ["matplotlib"]) == 0
        assert ("COUNTED: registers of a thread" in capsys.readouterr().out) == (registers is not None)


def test_comparison_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def worse(r: Record) -> Record:
        if r.variant == "bnfast" and r.status == MEASURED and r.direction == "forward":
            factor = 1.5 if r.cache == "cold" else 1.001
            us, low, high = ((v or 0) * factor for v in (r.us, r.us_low, r.us_high))
            return dataclasses.replace(r, us=us, us_low=low, us_high=high)
        return r

    before = made_up(suites.UNET3D)
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    records.append(a, before)
    records.append(b, [worse(r) for r in before])
    assert report.run(options(a, b), []) == 1
    text = capsys.readouterr().out
    cases_ = len(set(suites.UNET3D.layers))
    assert f"{cases_} of {4 * cases_} times are worse for sure" in text  # 1.001 is within the spread
    assert "1.500" in text
    assert max(map(len, text.splitlines())) <= 120
    assert report.run(options(a, a), []) == report.run(options(b, a), []) == 0
    assert report.changes(records.read(b), records.read(a))["sure"].sum() == cases_


# docs/benchmarks.md


def test_readme_is_made_of_the_committed_results() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    assert report.renewed(text, records.load([report.RESULTS])) == text, "python3 -m benchmarks readme"


def test_readme_tells_predictions_from_measurements() -> None:
    found = made_up(suites.RESNET50)
    predicted = report.readme_section(frame(r for r in found if r.status == PREDICTED))
    assert predicted.startswith("**Not measured yet")
    assert "torch x" not in predicted
    measured = report.readme_section(frame(found))
    assert "Not measured" not in measured
    assert "predicted" not in measured
    assert measured.count("| all layers | 53 |") == 2
    assert measured.endswith("Who computed: bnfast: BNFAST; torch: TORCH; compile-max: COMPILE-MAX.")
    with pytest.raises(ValueError, match="has no section between"):
        report.renewed("# bnfast", frame(found))
