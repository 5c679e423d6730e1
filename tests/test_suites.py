"""The networks whose layers are measured: what they consist of, what is counted, printed and written."""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfast
from benchmarks import __main__, first_look, measure, plots, report, session, suite_run, suites, tables
from benchmarks.suites import SUITES, Network, Shape, cube, square

NETWORKS = [network for networks in SUITES.values() for network in networks]
EVERY = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.file)
LAYOUTS = pytest.mark.parametrize("layout", suites.LAYOUTS)
CPU = torch.device("cpu")


# what they consist of


@pytest.mark.parametrize(("file", "layers", "distinct", "total"), [
    ("resnet50", 53, 12, 5_690_359_808), ("sd15-unet", 61, 14, 1_441_792_000),
    ("sdxl-unet", 46, 12, 618_659_840), ("sd15-vae", 30, 6, 918_552_576),
    ("sdxl-vae", 30, 6, 3_674_210_304), ("nnunet3d", 22, 6, 1_428_848_640), ("unet3d", 14, 11, 819_986_432),
])  # fmt: skip
def test_layers_are_known(file: str, layers: int, distinct: int, total: int) -> None:
    network = next(network for network in NETWORKS if network.file == file)
    assert (len(network.layers), len(set(network.layers))) == (layers, distinct)
    assert sum(shape.bytes(network.batch, 2) for shape in network.layers) == total


@pytest.mark.parametrize(("network", "shape", "times"), [
    (suites.RESNET50, square(64, 112), 1),
    (suites.RESNET50, square(256, 56), 4),  # three blocks and one way round
    (suites.RESNET50, square(2048, 7), 4),
    (suites.SD15_UNET, square(960, 64), 1),  # where 640 channels meet 320 of the way down
    (suites.SD15_UNET, square(2560, 8), 3),
    (suites.SDXL_UNET, square(1280, 32), 16),
    (suites.SDXL_VAE, square(128, 1024), 6),
    (suites.NNUNET, cube(320, 4), 2),
    (suites.UNET3D, cube(96, 128), 1),
], ids=str)  # fmt: skip
def test_a_shape_occurs_so_often(network: Network, shape: Shape, times: int) -> None:
    assert network.layers.count(shape) == times


@EVERY
def test_groups_divide_channels(network: Network) -> None:
    """In torch too: its own layers accept all of them."""
    for shape in set(network.layers):
        groups = network.groups_of(shape)
        assert (groups == 0) == (network.norm == "BatchNorm")
        assert groups == 0 or shape.channels % groups == 0


# what is counted


@EVERY
@LAYOUTS
def test_counted_bytes_are_the_sweeps_and_little_more(network: Network, layout: str) -> None:
    rows = tables.rows(network, 2, layout == "channels_last")
    assert {row.shape: row.count for row in rows} == Counter(network.layers)
    for row in rows:
        swept, swept_back = row.forward_launches == 2, row.backward_launches == 3
        if network.norm == "BatchNorm":
            swept_back = row.backward_launches == 2
        assert swept or layout == "contiguous"
        sweeps, sweeps_back = (3 if swept else 2), (5 if swept_back else 3)
        # cells of 64 values hand over a good part of what they are; those that matter do not
        spare = 1.02 if row.x_bytes > 5e7 else 1.7
        assert sweeps * row.x_bytes <= row.forward_bytes <= spare * sweeps * row.x_bytes
        assert sweeps_back * row.x_bytes <= row.backward_bytes <= spare * sweeps_back * row.x_bytes


def test_small_contiguous_groups_are_read_once() -> None:
    launches = {
        str(row.shape): (row.forward_launches, row.backward_launches)
        for row in tables.rows(suites.SD15_UNET, 2, channels_last=False)
    }
    assert launches["1280 x 16x16"] == (1, 2)
    assert launches["320 x 64x64"] == (1, 3)  # 80 KB of x, and not as much of x and dy
    assert launches["640 x 64x64"] == (2, 3)


def test_floor() -> None:
    assert tables.floor(4_300_000) == pytest.approx(1.0)


# what is printed and written

SLOW, FAST = measure.Times(12345.6, 23456.7, "Native"), measure.Times(1000.0, 2000.0, "bnfast")


def rows_of(network: Network, layout: str, gpu: bool) -> list[tables.Row]:
    rows = tables.rows(network, 2, layout == "channels_last")
    return [dataclasses.replace(row, bnfast=FAST, torch=SLOW) for row in rows] if gpu else rows


@EVERY
@LAYOUTS
@pytest.mark.parametrize("gpu", [True, False])
def test_tables_fit_a_terminal(network: Network, layout: str, gpu: bool) -> None:
    rows = rows_of(network, layout, gpu)
    absent = "-" if gpu else report.NEEDS_GPU
    shown = [tables.cells(row, absent) for row in (*rows, tables.total(rows))]
    text = report.table(tables.headers("C x size"), shown)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert text.count(report.NEEDS_GPU) == (0 if gpu else 2 * len(shown))
    speeds = report.table(tables.SPEED_HEADERS, [tables.speed(row) for row in rows])
    assert max(map(len, speeds.splitlines())) <= report.WIDTH


def test_total_of_measured_times() -> None:
    rows = rows_of(suites.RESNET50, "channels_last", True)
    assert tables.cells(tables.total(rows), "-")[-2:] == ["53000/106000", "654317/1243205"]
    unmeasured = [*rows[1:], rows_of(suites.RESNET50, "channels_last", False)[0]]
    assert tables.cells(tables.total(unmeasured), "-")[-2:] == ["-", "-"]


def test_one_csv_for_all(tmp_path: Path) -> None:
    """No cell is empty, whatever the network; what was not measured says so."""
    lines = [
        tables.csv_row(network, row, "bf16", "contiguous", report.NEEDS_GPU)
        for network in NETWORKS
        for row in rows_of(network, "contiguous", network is suites.RESNET50)
    ]
    report.write_csv(tmp_path / "t.csv", tables.CSV_HEADERS, lines)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == sum(len(set(network.layers)) for network in NETWORKS)
    assert all(cell for line in read for cell in line.values())
    first, last = read[0], read[-1]
    assert (first["channels"], first["size"], first["x_bytes"]) == ("64", "112x112", "411041792")
    assert (first["bnfast_forward_us"], first["torch_backend"]) == ("1000.0", "Native")
    rate = int(first["forward_bytes"]) / 1000 / 1e3  # bytes, microseconds
    assert float(first["bnfast_forward_GBps"]) == pytest.approx(rate, rel=1e-3)
    assert (last["network"], last["norm"], last["groups"]) == ("3-D U-Net", "GroupNorm", "8")
    assert (last["size"], last["torch_backward_us"]) == ("128x128x128", report.NEEDS_GPU)


def test_shapes_are_drawn(tmp_path: Path) -> None:
    plots.layers(tmp_path / "b.png", rows_of(suites.UNET3D, "contiguous", True), "title")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("asked", "expected"), [
    (None, ("contiguous",)), ("channels_last", ("channels_last",)), ("both", suites.LAYOUTS),
])  # fmt: skip
def test_layouts(asked: str | None, expected: tuple[str, ...]) -> None:
    assert suite_run.layouts(suites.SDXL_VAE, asked) == expected


def test_run_of_a_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(suite="sd-vae", layout="both", device="cpu", out=tmp_path)
    assert suite_run.run(options, ["matplotlib"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-1])) <= report.WIDTH  # the last one names the folder
    for network in SUITES["sd-vae"]:
        for layout in suites.LAYOUTS:
            assert network.title(layout) in text
    (folder,) = tmp_path.iterdir()
    assert text.rstrip().endswith(str(folder))
    assert [path.name for path in folder.iterdir()] == ["sd-vae.csv"]
    assert len((folder / "sd-vae.csv").read_text().splitlines()) == 1 + 2 * 2 * 6


def test_first_look_at_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each network besides ResNet-50, and the command for all lines of theirs."""
    look = session.Session(tmp_path, CPU, ["matplotlib"])
    first_look.resnet(look)
    first_look.networks(look)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    for network in NETWORKS[1:]:
        assert sum(line.startswith(f"{network.name}  ") for line in lines) == 1
    assert any("python3 -m benchmarks run --suite" in line for line in lines)
    assert {path.stem for path in tmp_path.glob("*.csv")} == set(SUITES)


# how they are measured


@pytest.mark.parametrize("network", [suites.RESNET50, suites.SDXL_UNET, suites.NNUNET, suites.UNET3D])
@LAYOUTS
@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_layers_are_compared(
    network: Network, layout: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Everything but the GPU's own clock, on shapes of the same kind but small."""
    monkeypatch.setattr(measure, "COLD_BYTES", 1)
    seconds = iter(range(1000))

    def stopwatch(work: object) -> float:
        work()  # type: ignore[operator]
        return float(next(seconds))

    shape = Shape(32, (4,) * len(network.layers[0].size))
    ours, theirs = measure.makers(network, shape, torch.bfloat16, CPU)
    assert type(ours()) is getattr(bnfast, type(theirs()).__name__)
    assert type(theirs()) in (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm3d)
    assert ours().state_dict().keys() == theirs().state_dict().keys()
    last = layout == "channels_last"
    found = measure.compare(ours, theirs, (2, 32, *shape.size), torch.bfloat16, last, CPU, stopwatch)
    assert [times.backend for times in found] == ["bnfast", "Native"]
    # four series of two rounds to warm up and twenty that count, of two buffers each
    assert [(times.forward, times.backward) for times in found] == [(5.75, 16.75), (27.75, 38.75)]


def test_a_gpu_is_asked_for_every_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU made up: rows have times, but for the shape that its memory does not hold."""

    class Properties:
        multi_processor_count = 132

    def compare(ours: object, theirs: object, shape: tuple[int, ...], *rest: object) -> object:
        if shape == (1, 96, 128, 128, 128):
            raise torch.OutOfMemoryError
        return FAST, SLOW

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(measure, "compare", compare)
    look = session.Session(tmp_path, torch.device("cuda"), ["matplotlib"])
    lines, rows = suite_run.in_full(look, suites.UNET3D, "contiguous")
    assert [row.label for row in rows if row.bnfast is None] == ["96 x 128x128x128"]
    assert suite_run.how_many(look, rows) == "counted; 10 of 11 shapes measured"
    assert sum(line[tables.CSV_HEADERS.index("torch_backend")] == "Native" for line in lines) == 10


# the command


@pytest.mark.parametrize("arguments", [["run"], ["run", "--suite", "vgg"], ["digits", "--layer", "RMSNorm"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        __main__.main(arguments)
    assert end.value.code == 2
    assert "usage: python3 -m benchmarks" in capsys.readouterr().err


def test_what_is_run_by_default() -> None:
    parse = __main__.parser().parse_args
    assert parse(["run", "--suite", "all"]).run is __main__.suites
    assert parse(["digits"]).layer == "BatchNorm"
    first = parse(["first-look", "--epochs", "3", "--seed", "1", "--device", "cpu", "--out", "here"])
    assert (first.run, first.epochs, first.out) == (__main__.first_look, 3, Path("here"))
