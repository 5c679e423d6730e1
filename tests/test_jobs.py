"""The benchmarks' command: what it refuses, and every job of a GPU from end to end on one that is made up."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import (
    ROOT,
    __main__,
    battery,
    digits,
    measure,
    records,
    report,
    session,
    stamp,
    suites,
    tile_sweep,
)
from benchmarks.layers import Run, layouts
from benchmarks.records import CANNOT, MEASURED, PREDICTED, Record, frame
from benchmarks.session import WIDTH
from benchmarks.tables import FLOOR_LABEL, WITH_LAUNCHES
from codegen.cases import DIRECTIONS, DTYPES, Case
from tests.support.made_up_gpu import make_up

CPU = torch.device("cpu")
TINY = Case("BatchNorm", (2, 4, 3, 3), 0, torch.bfloat16, True, suite="suite", network="network")

# the command


@pytest.mark.parametrize("arguments", ["run --suite vgg", "--layer RMSNorm", "gpu --limit 0", "report",
                                       "gpu --part nonsense", "first-look --epochs 0"])  # fmt: skip
def test_wrong_arguments_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        __main__.main(arguments.split())
    assert end.value.code == 2
    assert "usage: python3 -m benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "named"), [
    ("host --device nonsense", "argument --device: 'nonsense' is not one of "),
    ("host --device cuda:99", "argument --device: 'cuda:99'"),
    (f"host --device cpu --out {__file__}", "argument --out: no folder can be made in"),
    ("report nowhere", "argument PATH: nowhere: there is no such file"),
    ("report nowhere nowhere", "argument PATH: nowhere: there is no such file"),
    ("report nowhere nowhere nowhere", "argument PATH: one run is shown, two are compared, and these are 3"),
    (f"report {report.RESULTS} --out {__file__}", "argument --out: "),
])  # fmt: skip
def test_bad_input_is_named_and_is_no_verdict(
    arguments: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2: a comparison has 1 for figures that got worse."""
    assert __main__.main(arguments.split()) == 2
    assert f"error: {named}" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "number"), [(None, 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_has_its_number(asked: str | None, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device takes no device without one."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    torch.cuda.set_device(session.device_of(asked))
    assert chosen == [number]


def test_the_page_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(report, "PAGE", tmp_path / "benchmarks.md")
    before, _, rest = text.partition(report.BEGIN)
    report.PAGE.write_text(before + report.BEGIN + rest[rest.index(report.END) :], encoding="utf-8")
    assert __main__.main(["readme"]) == 0
    assert report.PAGE.read_text(encoding="utf-8") == text


def test_names_that_the_command_knows_are_those_that_exist() -> None:
    assert {"bnfast", *__main__.BASELINES} == measure.BASELINES.keys()
    assert digits.PAIRS.keys() == {*__main__.LAYERS}
    assert tuple(part.name for part in battery.PARTS) == __main__.PARTS
    assert set(__main__.DTYPES) <= set(DTYPES)


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = {session.new_folder(tmp_path / "deep") for _ in range(3)}
    assert folders == {*tmp_path.glob("deep/*-*-*_*-*-*")}
    assert len(folders) == 3


def test_layouts() -> None:
    assert layouts(suites.SDXL_VAE, None) == ("contiguous",)
    assert layouts(suites.SDXL_VAE, "channels_last") == ("channels_last",)
    assert layouts(suites.SDXL_VAE, "both") == suites.LAYOUTS


@pytest.mark.parametrize(("shape", "last", "message"), [
    ((4, 8), True, "channels_last is a layout of 4-D and 5-D"), ((0, 3, 4, 4), False, "positive sizes"),
    ((7,), False, "shape must be"),
])  # fmt: skip
def test_cases_that_there_are_not(shape: tuple[int, ...], last: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case("BatchNorm", shape, 0, torch.float32, last)


def test_run_of_a_suite_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions, in the terminal and in a file."""
    monkeypatch.setattr("benchmarks.predict.why_not_counted", lambda: "no registers: a test")
    monkeypatch.setattr("benchmarks.environment.ensure", lambda: ["matplotlib"])
    code, folder = job(tmp_path, "run", "--suite", "sd-vae", "--layout", "both")
    assert code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-1])) <= WIDTH  # the last one names the folder
    assert "MEASURED" not in text
    found = records.read(folder / "predicted.csv")
    assert len(found) == 2 * 2 * 2 * 7
    assert set(found["status"]) == {PREDICTED}
    (note,) = set(found["note"])
    assert note.startswith(f"{FLOOR_LABEL}; {WITH_LAUNCHES}; no registers: a test")


@pytest.mark.slow
def test_a_case_is_timed_by_pytest_benchmark() -> None:
    """`pytest benchmarks` works as a command of its own."""
    chosen = "GroupNorm and (bnfast or torch or frontend)"
    own = ("TRITON_INTERPRET", "PYTEST_")  # the outer pytest's variables say that it has workers
    variables = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "benchmarks",
        "-k",
        chosen,
        "-pno:cacheprovider",
        "-pno:xdist",
    ]
    found = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "4 passed, 2 skipped" in found.stdout
    assert "test_layer[bnfast-" in found.stdout


# the tile sweep


def test_every_candidate_takes_the_place_of_the_planned_one() -> None:
    from bnfast.kernels import plan
    from bnfast.kernels.records import Problem

    x, planned = Problem(256, 256, 3136, 2, True), []
    for family, programs in tile_sweep.CANDIDATES.items():
        for program in programs:
            with tile_sweep.planned_with(family, program) as is_planned:
                planned += [family] * is_planned
                assert getattr(plan, family)[0] == plan.Program(*program)
                found = plan.plan_elementwise(x, 1) if family == "ELEMENTWISE" else plan.plan_reduction(x, 1)
                if family != "REDUCE_NCHW":
                    assert (found.warps, found.registers) == (program[0], program[2])
    assert planned == [*tile_sweep.CANDIDATES]
    assert plan.plan_reduction(x, 1).warps == plan.REDUCE[0].warps


def test_a_better_tile_is_named() -> None:
    def timed(variant: str, us: float, note: str = "") -> Record:
        return Record("sweep", MEASURED, variant, shape="1x2", direction="forward", us=us, note=note)

    stands = [
        timed("ELEMENTWISE 4/7/72/4", 100, "planned; 1 of 7 late"),
        timed("ELEMENTWISE 4/8/64/4", 97),
    ]
    assert tile_sweep.beaten(frame(stands)) == []
    (line,) = tile_sweep.beaten(frame([*stands, timed("ELEMENTWISE 8/4/64/4", 80)]))
    assert "ELEMENTWISE 8/4/64/4 is 1.25 times as fast as the planned program" in line
    assert "is nan times as fast" in tile_sweep.beaten(frame(stands[1:]))[0]


# a GPU made up


def test_every_figure_is_on_disk_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the copy rate of its run, the clock of its case, and what they were measured on. A case that does
    not fit the memory is named, and the next goes on."""

    def of_case(case: Case, *rest: object) -> Iterator[Record]:
        if case.shape[0] == 9:
            raise torch.OutOfMemoryError("too large")
        columns = measure.columns(case)
        yield Record(**columns, status=MEASURED, us=1.0)
        assert len(records.read(tmp_path / "layers.csv")) == 1
        yield Record(**columns, status=MEASURED, us=2.0)

    monkeypatch.setattr(measure, "of_case", of_case)
    monkeypatch.setattr("benchmarks.machine.copies", lambda device: [])
    monkeypatch.setattr("benchmarks.machine.copy_rate", lambda lines: 4200.0)
    monkeypatch.setattr(stamp, "clocks", lambda device: {"clock_MHz": 1755.0})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run = Run(session.Session(tmp_path, CPU, []), measure.Method(), ["torch"], tmp_path / "layers.csv")
    found = [*run.case(TINY), *run.case(dataclasses.replace(TINY, shape=(9, 4, 3, 3)))]
    assert records.read(tmp_path / "layers.csv").equals(frame(found))
    assert [(r.status, r.us, r.copy_GBps, r.clock_MHz) for r in found] == [
        (MEASURED, 1.0, 4200.0, 1755.0), (MEASURED, 2.0, 4200.0, 1755.0), (CANNOT, None, 4200.0, None),
    ]  # fmt: skip
    assert found[-1].note == "OutOfMemoryError: too large"
    assert all(r.versions.startswith("bnfast=") for r in found)


@pytest.fixture
def gpu(plain_torch_in_one_thread: None, shallow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)


def job(folder: Path, *arguments: str) -> tuple[int, Path]:
    code = __main__.main([*arguments, "--device", "cpu", "--out", str(folder)])
    (made,) = folder.iterdir()
    return code, made


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "options", [["--suite", "resnet50"], ["--quick", "--direction", "fwd"]], ids=" ".join
)
def test_run_from_end_to_end(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = job(tmp_path, "run", *options)
    assert code == 0
    text = capsys.readouterr().out
    assert "MEASURED, forward" in text
    assert ("forward and backward in a CUDA graph" in text) == ("--quick" not in options)
    assert max(map(len, text.splitlines()[:-1])) <= 120
    found = records.read(folder / "layers.csv")
    timed = found[found["status"] == MEASURED]
    assert set(timed["variant"]) == {"bnfast", "torch", "native"}
    assert set(timed["gpu"]) == {"made up"}
    assert (timed["copy_GBps"] > 0).all()
    assert (folder / "ResNet-50-BatchNorm-bf16-channels_last.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_the_battery_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part that this machine has the programs for; then the report of its records, and a comparison."""
    code, folder = job(tmp_path, "gpu")
    text = capsys.readouterr().out
    assert code == 0, text
    summary = text[text.index("\nSummary\n") :]
    lines = re.findall(r"^(DONE|PART|NOT RUN|FAIL) +([\w-]+) ", summary, re.MULTILINE)
    ended = {name: state for state, name in lines}
    assert ended == dict.fromkeys(__main__.PARTS, "DONE") | {"cudnn-frontend": "NOT RUN"}
    made = {path.stem for path in folder.glob("*.csv")}
    assert made == {part for part, state in ended.items() if state == "DONE"}
    assert max(map(len, text.splitlines()[:-1])) <= 120
    assert (folder / "ResNet-50-BatchNorm-bf16-channels_last.png").exists()
    assert __main__.main(["report", str(folder)]) == 0
    assert (folder / "roofline.png").exists()
    assert __main__.main(["report", str(folder), str(folder)]) == 0
    steps, tiles = (records.read(folder / f"{part}.csv") for part in ("step", "tiles"))
    assert steps["status"].tolist() == [MEASURED] * 7  # three networks, eager and as a graph; the process
    assert (steps["peak_MB"][:6] > 0).all()
    assert tiles["variant"].nunique() == sum(map(len, tile_sweep.CANDIDATES.values())) + 1
    own = tiles["variant"][tiles["note"] == tile_sweep.PLANNED].str.partition(" ")[0]
    assert own.tolist() == [family for family in tile_sweep.CANDIDATES for _ in DIRECTIONS]


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_the_first_look_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = job(tmp_path, "--epochs", "1")
    text = capsys.readouterr().out
    assert code == 0, text
    assert "PASS     training" in text
    assert re.search(r"^DONE +resnet-50 +2 of 2 cases measured$", text, re.MULTILINE), text
    assert "python3 -m benchmarks run --suite" in text
    others = [
        network.name for each in suites.SUITES.values() for network in each if "Res" not in network.name
    ]
    assert all(re.search(rf"^{name}  ", text, re.MULTILINE) for name in others)
    assert (folder / "digits-losses.png").exists()
