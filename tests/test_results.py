"""Records, and what is made of them: CSV files, tables, pictures, comparisons; and the jobs that do it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import (
    __main__,
    cases,
    compare,
    figures,
    first_look,
    layers,
    predict,
    readme,
    records,
    report,
    session,
    show,
    suites,
    tables,
)
from benchmarks.records import CANNOT, MEASURED, PREDICTED, Record
from benchmarks.suites import SUITES, Network
from codegen.cases import DIRECTIONS, Case

NETWORKS = [network for networks in SUITES.values() for network in networks]
EVERY = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.file)
CPU = torch.device("cpu")


def made_up(network: Network, slower: float = 2.0) -> list[Record]:
    """As a run on a GPU leaves them: predictions, and bnfast's times with those of two others."""
    found = []
    for r in predict.records(cases.of_network("suite", network, torch.bfloat16, True), compiled=False):
        found.append(r)
        us = (r.floor_bytes or 0) / 4e6
        for variant, factor in (("bnfast", 1.0), ("torch", slower), ("compile-max", 1.5)):
            for cache in ("cold", "warm"):
                found.append(
                    dataclasses.replace(
                        r,
                        status=MEASURED,
                        variant=variant,
                        ran=variant.upper(),
                        cache=cache,
                        mode="eager",
                        us=us * factor,
                        us_low=us * factor * 0.99,
                        us_high=us * factor * 1.01,
                        rounds=20,
                        GBps=4000 / factor,
                        copy_GBps=4400.0,
                        gpu="made up",
                    )  # fmt: skip
                )
        found.append(dataclasses.replace(r, status=CANNOT, variant="cudnn-op", note="needs a GPU with cuDNN"))
    return found


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    found = made_up(suites.UNET3D)
    for half in (found[:5], found[5:]):
        records.append(tmp_path / "a.csv", half)
    assert records.read(tmp_path / "a.csv") == found


@pytest.mark.parametrize(("text", "message"), [
    ("a,b\n1,2\n", "a.csv: its columns are not those of .*; they differ in .* and 37 more"),
    ("", "a.csv: .*; it is empty"),
    (",".join(records.HEADERS[:-1]) + "\n", "they differ in date$"),
    (",".join(records.HEADERS[::-1]) + "\n", "they differ in their order"),
    (",".join(records.HEADERS) + "\n" + ",".join("x" for _ in records.HEADERS) + "\n", "line 2"),
    (",".join(records.HEADERS) + "\nlayer" + "," * (len(records.HEADERS) - 1) + "\n", "line 2: shape is ''"),
    ("\udcff", "a.csv: it cannot be read as CSV in UTF-8"),
])  # fmt: skip
def test_another_csv_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        records.read(tmp_path / "a.csv")
    assert not records.is_ours(tmp_path / "a.csv") or "line 2" in message


def test_a_folder_is_read_whatever_else_lies_in_it(tmp_path: Path) -> None:
    found = made_up(suites.UNET3D)
    (tmp_path / "folder.csv").mkdir()
    records.append(tmp_path / "folder.csv" / "ours.csv", found)
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    (tmp_path / "empty.csv").touch()
    assert show.load([tmp_path]) == found


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    found = made_up(suites.UNET3D)
    file = written(tmp_path, "a.csv", found)
    whole = file.read_text()
    file.write_text(whole + "layer,measured,bnf")
    with pytest.warns(UserWarning, match="its last line is cut off"):
        assert records.read(file) == found
    first, _, rest = whole.partition("\n")
    file.write_text(f"{first}\nlayer,measured,bnf\n{rest}")
    with pytest.raises(ValueError, match="line 2: it has not as many cells"):
        records.read(file)


@pytest.mark.parametrize(("shape", "last", "message"), [
    ((4, 8), True, "channels_last is a layout of 4-D and 5-D"), ((0, 3, 4, 4), False, "positive sizes"),
    ((7,), False, "shape must be"),
])  # fmt: skip
def test_cases_that_there_are_not(shape: tuple[int, ...], last: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case("", "", "BatchNorm", shape, 0, torch.float32, last)


def fits(table: tables.Table) -> list[str]:
    lines = report.table(*table).splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    return lines


@EVERY
def test_tables_fit_a_terminal(network: Network) -> None:
    found = made_up(network)
    *_, total = fits(tables.predicted(found))
    assert total.split()[:2] == ["all", str(len(network.layers))]
    for direction in DIRECTIONS:
        (table,) = tables.measured(found, direction)
        *_, total = fits(table)
        assert total.split()[-2:] == ["2.00", "1.50"]
        assert table[0][-2:] == ("torch x", "compile-max x")
    assert tables.refusals(found)[0].startswith("cudnn-op: needs a GPU with cuDNN")
    assert "torch: TORCH" in tables.who_ran(found)


def test_columns_of_compiled_kernels_are_there_where_kernels_were_compiled() -> None:
    found = [r for r in made_up(suites.UNET3D) if r.status == PREDICTED]
    headers, rows = tables.predicted(found)
    assert set(tables.CODE).isdisjoint(headers)
    assert {len(row) for row in rows} == {len(headers)} == {7}
    compiled = [dataclasses.replace(r, registers=64, in_flight_KB=48.0) for r in found]
    headers, rows = tables.predicted(compiled)
    assert [rows[-1][headers.index(name)] for name in tables.CODE] == ["64/64", "48/48"]


def test_many_others_take_more_tables() -> None:
    (first, *rest) = made_up(suites.UNET3D)[1:2]
    assert not rest
    many = [dataclasses.replace(first, variant=name) for name in ("bnfast", *"abcdefg")]
    assert [len(headers) for headers, _ in tables.measured(many, "forward")] == [10, 9]


def test_a_total_needs_every_layer() -> None:
    found = made_up(suites.UNET3D)
    lacking = [r for r in found if not (r.variant == "torch" and r.shape.startswith("1x96x"))]
    ((_, rows),) = tables.measured(lacking, "forward")
    assert rows[-1][-2:] == ["-", "1.50"]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    found = made_up(suites.RESNET50)
    figures.layers(tmp_path / "layers.png", found, "title")
    assert figures.roofline(tmp_path / "roofline.png", found)
    assert figures.ratios(tmp_path / "ratios.png", found, "forward")
    assert figures.total(tmp_path / "total.png", found, "ResNet-50")
    assert {p.read_bytes()[:4] for p in tmp_path.iterdir()} == {b"\x89PNG"}
    assert len(list(tmp_path.iterdir())) == 4
    predicted = [r for r in found if r.status == PREDICTED]
    assert not figures.roofline(tmp_path / "none.png", predicted)
    assert not (tmp_path / "none.png").exists()


def written(tmp_path: Path, name: str, found: list[Record]) -> Path:
    records.append(tmp_path / name, found)
    return tmp_path / name


def test_report_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, "a.csv", made_up(suites.RESNET50))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    options = argparse.Namespace(paths=[tmp_path], out=None)
    assert show.run(options, []) == 0
    text = capsys.readouterr().out
    assert "PREDICTED" in text
    assert "MEASURED, backward" in text
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "roofline.png", "ratios-forward.png", "ratios-backward.png", "resnet50-total.png",
    }  # fmt: skip
    for wrong in (tmp_path / "nothing", tmp_path / "other.csv"):
        with pytest.raises(report.Refused, match="PATH: .*(nothing|other)"):
            show.run(argparse.Namespace(paths=[wrong], out=None), [])


def test_comparison_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def worse(r: Record) -> Record:
        if r.variant == "bnfast" and r.status == MEASURED and r.direction == "forward":
            factor = 1.5 if r.cache == "cold" else 1.001
            us, low, high = ((v or 0) * factor for v in (r.us, r.us_low, r.us_high))
            return dataclasses.replace(r, us=us, us_low=low, us_high=high)
        return dataclasses.replace(r, launches=(r.launches or 0) + 1) if r.status == PREDICTED else r

    before = made_up(suites.UNET3D)
    a = written(tmp_path, "a.csv", before)
    b = written(tmp_path, "b.csv", [worse(r) for r in before])
    options = argparse.Namespace(before=a, after=b, top=5)
    assert compare.run(options, []) == 1
    text = capsys.readouterr().out
    cases_ = len(set(suites.UNET3D.layers))
    assert f"{3 * cases_} of {14 * cases_} figures are worse for sure." in text  # 1.001 is within the spread
    assert "1.500" in text
    assert compare.run(argparse.Namespace(before=a, after=a, top=5), []) == 0


def test_run_of_a_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU: predictions, in the terminal and in a file."""
    options = __main__.parser().parse_args(
        ["run", "--suite", "sd-vae", "--layout", "both", "--device", "cpu", "--out", str(tmp_path)]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "why_not_compiled", lambda: "no registers: a test")
        assert layers.run(options, ["matplotlib"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-1])) <= report.WIDTH  # the last one names the folder
    assert "MEASURED" not in text
    (folder,) = tmp_path.iterdir()
    found = records.read(folder / "predicted.csv")
    assert len(found) == 2 * 2 * 2 * 7
    assert {(r.status, r.note.rpartition("; ")[2]) for r in found} == {(PREDICTED, "no registers: a test")}


def test_first_look_at_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each network that is no ResNet-50, and the command for all lines of theirs."""
    look = session.Session(tmp_path, CPU, ["matplotlib"])
    first_look.resnet(look)
    first_look.networks(look)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    for network in (network for network in NETWORKS if "ResNet-50" not in network.name):
        assert sum(line.startswith(f"{network.name}  ") for line in lines) == 1
    assert any("python3 -m benchmarks run --suite" in line for line in lines)


@pytest.mark.parametrize(("asked", "expected"), [
    (None, ("contiguous",)), ("channels_last", ("channels_last",)), ("both", suites.LAYOUTS),
])  # fmt: skip
def test_layouts(asked: str | None, expected: tuple[str, ...]) -> None:
    assert layers.layouts(suites.SDXL_VAE, asked) == expected


# README


def test_readme_is_made_of_the_committed_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.renewed(text, show.load([readme.RESULTS])) == text, "python3 -m benchmarks readme"


def test_readme_tells_predictions_from_measurements() -> None:
    found = made_up(suites.RESNET50)
    predicted = readme.section([r for r in found if r.status == PREDICTED])
    assert predicted.startswith("**Not measured yet")
    assert "torch x" not in predicted
    measured = readme.section(found)
    assert "Not measured" not in measured
    assert "predicted" not in measured
    assert measured.count("| all layers | 53 |") == 2
    assert measured.endswith("Who computed: bnfast: BNFAST; torch: TORCH; compile-max: COMPILE-MAX.")
    with pytest.raises(ValueError, match="has no section between"):
        readme.renewed("# bnfast", found)


def test_notes_have_the_room_that_is_left() -> None:
    note = "the largest buffer whose second sweep is served by L2 at more than twice the rate of memory"
    long = Record("probe", MEASURED, "L2 reuse: read after write, forwards", shape="12800 KiB", note=note)
    table = tables.plain([long, dataclasses.replace(long, variant="short", us=1234567.8, note="short")])
    assert max(map(len, report.table(tables.PLAIN_HEADERS, table).splitlines())) == report.WIDTH
    assert table[0][-1].endswith("...")
    assert table[1][-1] == "short"
    assert tables.plain([]) == []
