"""The benchmarks' command, what its jobs refuse, and the sweep of tiles: all that shows without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import (
    __main__,
    baselines,
    battery,
    layers,
    measure,
    readme,
    records,
    session,
    stopwatch,
    tile_sweep,
)
from benchmarks.machine import bandwidth, clocks
from benchmarks.records import CANNOT, MEASURED, Record
from codegen.cases import DTYPES, Case

CPU = torch.device("cpu")


# the tile sweep


def test_every_candidate_takes_the_place_of_the_planned_one() -> None:
    from bnfast.kernels import plan

    size = (256, 256, 3136, 2, True, True, 132)
    for family, candidates in tile_sweep.CANDIDATES.items():
        assert any(tile_sweep.is_planned(family, program) for program in candidates)
        for program in candidates:
            with tile_sweep.planned_with(family, program):
                assert tile_sweep.is_planned(family, program)
                sweep = plan.map_sweep(*size, 1) if family == "MAPS" else plan.reduce_sweep(*size, 1)
                if family != "REDUCE_RUNS":
                    assert (sweep.warps, sweep.registers) == (program[0], program[2])
    assert plan.reduce_sweep(*size, 1).warps == plan.REDUCE[0].warps


def test_a_better_tile_is_named() -> None:
    def timed(variant: str, us: float, note: str = "") -> Record:
        return Record("sweep", MEASURED, variant, shape="1x2", direction="forward", us=us, note=note)

    stands = [timed("MAPS 4/7/72/4", 100, "planned"), timed("MAPS 4/8/64/4", 97)]
    assert tile_sweep.beaten(stands) == []
    (line,) = tile_sweep.beaten([*stands, timed("MAPS 8/4/64/4", 80)])
    assert "MAPS 8/4/64/4 is 1.25 times as fast as MAPS 4/7/72/4" in line
    assert "was not timed" in tile_sweep.beaten(stands[1:])[0]


def test_a_sweep_says_which_program_is_the_planned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "COLD_BYTES", 1)
    tiny = Case("sweep", "", "BatchNorm", (2, 4, 3, 3), 0, torch.bfloat16, True)
    found = list(tile_sweep.sweep(CPU, [tiny], lambda work: (work(), 1.0)[1], rounds=1))
    assert {r.status for r in found} == {MEASURED}
    candidates = ((family, each) for family, all_ in tile_sweep.CANDIDATES.items() for each in all_)
    own = {tile_sweep.name(*each) for each in candidates if tile_sweep.is_planned(*each)}
    assert {r.variant for r in found if r.note == "planned"} == own
    assert len(own) == len(tile_sweep.CANDIDATES)


# the command


@pytest.mark.parametrize("arguments", [["run", "--suite", "vgg"], ["digits", "--layer", "RMSNorm"],
                                       ["gpu", "--limit", "0"], ["compare", "one"],
                                       ["gpu", "--part", "nonsense"],
                                       ["digits", "--epochs", "0"]])  # fmt: skip
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        __main__.main(arguments)
    assert end.value.code == 2
    assert "usage: python3 -m benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "named"), [
    (["memory", "--device", "nonsense"], "argument --device: 'nonsense' is not \"cpu\" or a GPU"),
    (["memory", "--device", "cuda:99"], "argument --device: 'cuda:99'"),
    (["memory", "--device", "cpu", "--out", __file__], "argument --out: no folder can be made in"),
    (["report", "nowhere"], "argument PATH: nowhere: there is no such file"),
    (["compare", "nowhere", "nowhere"], "arguments before, after: nowhere: there is no such file"),
    (["report", str(readme.RESULTS), "--out", __file__], "argument --out: "),
])  # fmt: skip
def test_bad_input_is_named_and_is_no_verdict(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2: `compare` has 1 for figures that got worse."""
    assert __main__.main(arguments) == 2
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


def test_what_is_run_by_default() -> None:
    parse = __main__.parser().parse_args
    assert parse(["run"]).suite == "resnet50"
    assert parse(["digits"]).layer == "BatchNorm"
    first = parse(["first-look", "--epochs", "3", "--seed", "1", "--device", "cpu", "--out", "here"])
    assert (first.module, first.epochs, first.out) == ("first_look", 3, Path("here"))


def test_names_that_the_command_knows_are_those_that_exist() -> None:
    assert {"bnfast", *__main__.BASELINES} == baselines.BASELINES.keys()
    assert tuple(part.name for part in battery.PARTS) == __main__.PARTS
    assert set(__main__.DTYPES) <= set(DTYPES)


# a run with a GPU made up


def test_every_figure_is_on_disk_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the copy rate of its run, the clock of its case, and what they were measured on. A case that does
    not fit the memory is named, and the next goes on."""

    class OnGpu(session.Session):
        gpu = True

    case = Case("suite", "network", "BatchNorm", (2, 4, 3, 3), 0, torch.float32, True)

    def of_case(case: Case, *rest: object) -> Iterator[Record]:
        if case.shape[0] == 9:
            raise torch.OutOfMemoryError("too large")
        yield Record(**case.columns, status=MEASURED, us=1.0)
        assert len(records.read(tmp_path / "layers.csv")) == 1
        yield Record(**case.columns, status=MEASURED, us=2.0)

    monkeypatch.setattr(measure, "of_case", of_case)
    monkeypatch.setattr(bandwidth, "copy_rate", lambda device: 4.2e12)
    monkeypatch.setattr(clocks, "read", lambda device: clocks.Clocks(sm_MHz=1755.0, temperature_C=40.0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run = layers.Run(OnGpu(tmp_path, CPU, []), measure.Method(), ["torch"], tmp_path / "layers.csv")
    found = [*run.case(case), *run.case(dataclasses.replace(case, shape=(9, 4, 3, 3)))]
    assert records.read(tmp_path / "layers.csv") == found
    assert [(r.status, r.us, r.copy_GBps, r.clock_MHz) for r in found] == [
        (MEASURED, 1.0, 4200.0, 1755.0), (MEASURED, 2.0, 4200.0, 1755.0), (CANNOT, None, 4200.0, None),
    ]  # fmt: skip
    assert found[-1].note == "OutOfMemoryError: too large"
    assert all(r.versions.startswith("bnfast=") for r in found)
