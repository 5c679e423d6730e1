"""`python3 -m benchmarks step`: its table, its files, and what it says where there is no GPU."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import model_step, records, step_run
from benchmarks.__main__ import parser
from benchmarks.model_variants import COMPILED, PLAIN, TORCH, Variant
from benchmarks.records import CANNOT, MEASURED, Record
from tests.support.steps import CPU, QUICK, SMALL, biased

pytestmark = pytest.mark.usefixtures("plain_torch_in_one_thread")


def line(
    variant: str, us: float | None, mode: str = "eager", norm: str = "BatchNorm", **given: object
) -> Record:
    status = CANNOT if us is None else MEASURED
    return Record("step", status, variant, norm=norm, mode=mode, shape="256x3x224x224", us=us, us_low=us,
                  us_high=us, **given)  # type: ignore[arg-type]  # fmt: skip


def test_ratios_and_shares_come_from_the_same_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line("torch", 100e3, peak_MB=20_000), line("torch", None, "graph", note="RuntimeError: no"),
        line("fused", 80e3, loss_apart=1e-4, loss_allowed=3e-4), line("torch", 60e3, norm="none"),
        line("torch", 120e3), line("torch.compile", 90e3), line("fused, torch.compile", 60e3),
        line("torch.compile", 45e3, norm="none"),
    ]  # fmt: skip
    found = [(r["of torch"], r["norms"]) for r in step_run.rows(lines)]
    assert found == [
        ("1.000", "40.0%"), ("", ""), ("0.800", "25.0%"), ("0.600", ""),
        ("1.000", "50.0%"), ("0.750", "50.0%"), ("0.500", "25.0%"), ("0.375", ""),
    ]  # fmt: skip
    wide = replace(lines[-1], us=123456.7, us_low=123123.4, us_high=123789.0, peak_MB=34567.8)
    step_run.show([*lines, wide], step_run.TIMES)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "Cannot (graph): torch: RuntimeError: no" in out
    assert "1.0e-04  3.0e-04" in out


def options(tmp_path: Path, *more: str) -> argparse.Namespace:
    return parser().parse_args(["step", "--device", "cpu", "--out", str(tmp_path), *more])


@pytest.mark.usefixtures("shallow")
def test_on_a_cpu_a_tiny_network_shows_that_losses_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_run, "plan", lambda *_: (SMALL, (4,), (PLAIN[:3],), QUICK))
    assert step_run.run(options(tmp_path), []) == 0
    out = capsys.readouterr().out
    assert "Without a GPU there is no step time of ResNet-50" in out
    assert "PASS     step 3 of 6 measured, all losses agree (a tiny network; step times need a GPU)" in out
    assert " ms " not in out
    (file,) = tmp_path.glob("*/step.csv")
    assert [each.variant for each in records.read(file)] == [v.name for v in PLAIN[:3] for _ in range(2)]
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("shallow")
def test_disagreement_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = ((TORCH, Variant("biased", biased)),)
    monkeypatch.setattr(step_run, "plan", lambda *_: (SMALL, (4,), stages, QUICK))
    assert step_run.run(options(tmp_path), []) == 1


def test_the_plan_of_a_cpu_and_of_a_gpu() -> None:
    class Here:
        gpu, device = False, CPU

    task, _, stages, _ = step_run.plan(Here, (256,))  # type: ignore[arg-type]
    assert task.dtype == torch.float64
    assert str(task) != "ResNet-50"
    Here.gpu = True
    task, batches, stages, _ = step_run.plan(Here, (64, 8))  # type: ignore[arg-type]
    assert (str(task), task.dtype, batches, stages) == (
        "ResNet-50",
        torch.bfloat16,
        (64, 8),
        (PLAIN, COMPILED),
    )


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert options(tmp_path).batch == list(model_step.BATCHES)
    given = options(tmp_path, "--batch", "64", "8", "--budget", "120")
    assert (given.batch, given.budget) == ([64, 8], 120)
    with pytest.raises(SystemExit):
        options(tmp_path, "--batch", "0")
    assert "--batch: '0' is no whole number above 0" in capsys.readouterr().err
