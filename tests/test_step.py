"""The training step of a whole network: its losses, its times, its budget, and what becomes of a failure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfast
from benchmarks import records, report, resnet, step, tables, timing
from benchmarks.__main__ import parser
from benchmarks.records import CANNOT, MEASURED, Record, frame
from benchmarks.resnet import PLAIN, TORCH, Variant
from benchmarks.step import Effort, measure_steps
from tests.support.made_up_gpu import make_up
from tests.support.steps import QUICK, SMALL, TASK, biased, measured

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("plain_torch_in_one_thread", "shallow", "eager_steps"),
]
FUSED, RESNET50 = Variant("fused", bnfast.fuse), resnet.resnet50


@pytest.fixture
def eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is made up, where most tests need no graphs."""
    monkeypatch.setattr(step, "MODES", ("eager",))
    make_up(monkeypatch)


# what is trained


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch, shallow: None) -> None:
    monkeypatch.setattr(resnet, "resnet50", RESNET50)


@pytest.mark.usefixtures("deep")
def test_variants_are_what_they_are_called() -> None:
    """Of a network whose norms are fp32 where it is bf16, as people train it."""
    task = replace(TASK, dtype=torch.bfloat16)
    made = {v.name: v.change(resnet.network(task)) for v in PLAIN}
    assert len(bnfast.fusion_report(made["fused"]).fused) == 49
    assert sum(type(m) is bnfast.BatchNorm2d for m in made["converted"].modules()) == 53
    norms = [m for m in made["torch"].modules() if type(m) is nn.BatchNorm2d]
    assert len(norms) == 53
    assert {t.dtype for m in norms for t in (m.weight, m.bias, m.running_var)} == {torch.float32}
    others = [m.weight for m in made["torch"].modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert {t.dtype for t in others} == {torch.bfloat16}
    assert made["torch"][0][0].weight.equal(made["fused"][0][0].weight)


def test_reset_goes_back_to_the_first_step() -> None:
    """In the same memory, momentum and running statistics included."""
    training = step.Step(TORCH, SMALL, *SMALL.batch(4))
    first = step.curve(training, training, 5)
    address = next(training.model.parameters()).data_ptr()
    assert step.curve(training, training, 5).equal(first)
    assert next(training.model.parameters()).data_ptr() == address
    assert first[-1] < first[0]


# losses


@pytest.mark.usefixtures("deep")
def test_losses_of_all_variants_agree_in_fp32() -> None:
    """ResNet-50, narrow. And what a record of it says."""
    found = measured(*PLAIN, effort=Effort(rounds=1, steps=1, losses=2, orders=1), task=TASK)
    ran = {"torch": "torch", "fused": "plain torch", "converted": "plain torch"}
    assert {name: line.ran for name, line in found.items()} == ran
    assert step.disagreeing([*found.values()]) == []
    assert found["torch"].loss_apart is None
    for name in ("fused", "converted"):
        assert found[name].loss_apart <= found[name].loss_allowed < 0.01
    first = found["torch"]
    assert (first.kind, first.status, first.dtype, first.mode) == ("step", MEASURED, "fp32", "eager")
    assert (first.network, first.shape) == ("ResNet-50 of width 8", "4x3x32x32")
    assert str(replace(TASK, width=64)) == "ResNet-50"


def test_a_layer_that_is_wrong_in_the_tenth_digit_is_found() -> None:
    found = measured(TORCH, Variant("biased", biased), Variant("converted", bnfast.convert))
    (fault,) = step.disagreeing([*found.values()])
    assert fault.startswith("biased (eager, 4x3x8x8): losses ")
    assert 6e-16 < found["biased"].loss_allowed < 1e-13


def test_nan_is_a_difference_wherever_it_is() -> None:
    right = torch.tensor([1.0, 2.0, 3.0])
    assert step.apart(right, right) == 0
    assert math.isnan(step.apart(torch.tensor([1.0, math.nan, 3.0]), right))
    for apart, allowed in ((math.nan, 1.0), (0.5, math.nan)):
        assert step.disagreeing([Record("step", MEASURED, loss_apart=apart, loss_allowed=allowed)])


# time


def test_a_slower_variant_is_reported_slower_by_as_much() -> None:
    def slowed(model: nn.Module) -> nn.Module:
        model.register_forward_hook(lambda *_: time.sleep(0.05))
        return model

    found = measured(TORCH, Variant("slowed", slowed))
    assert found["torch"].us < 50_000 <= found["slowed"].us_low <= found["slowed"].us


def test_rounds_go_over_all_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample has its untimed step, then as many as asked for, and begins with the first weights, seen by
    BatchNorm's counter; the figure is a median a step."""
    seen: list[str] = []

    def noting(name: str) -> Variant:
        def change(model: nn.Module) -> nn.Module:
            model.register_forward_hook(lambda m, *_: seen.append(f"{name}{m[1].num_batches_tracked}"))
            return model

        return Variant(name, change)

    times = iter([100.0, 1.0, 2.0, 300.0, 500.0, 3.0])  # in the order of the samples: a b, b a, a b

    def stopwatch(work: Callable[[], None]) -> float:
        seen.append("<")
        work()
        seen.append(">")
        return next(times)

    monkeypatch.setattr(step, "stopwatch", stopwatch)
    found = measured(noting("a"), noting("b"))
    assert "".join(seen).endswith("a1<a2a3>b1<b2b3>b1<b2b3>a1<a2a3>a1<a2a3>b1<b2b3>")
    a, b = (found[name] for name in "ab")
    assert (a.us, a.us_low, a.us_high, a.rounds) == (150, 100, 200, 3)  # 100, 300, 500 for two steps
    assert b.us == 1


# budget and failures


def test_nothing_is_begun_after_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made ready in time is measured, in few rounds; without a budget all rounds are done."""
    seconds = iter(range(100))
    monkeypatch.setattr(step, "monotonic", lambda: next(seconds))
    stages, many = ((TORCH, FUSED, Variant("converted", bnfast.convert)),) * 2, replace(QUICK, rounds=7)
    lines = list(measure_steps(SMALL, (4, 2), 2.5, stages, many))
    assert [line.status for line in lines] == [MEASURED] * 2 + [CANNOT] * 10
    assert {line.rounds for line in lines[:2]} == {3}
    assert {line.note for line in lines[2:]} == {"no time left"}
    assert {line.suite for line in lines[:6]} == {"stage 1"} != {line.suite for line in lines[6:]}
    assert measured(TORCH, effort=many)["torch"].rounds == 7


class Failing:
    """Raises once, in the forward after so many."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after, self.error, self.calls = after, error, 0

    def hook(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.after + 1:
            raise self.error

    def __call__(self, model: nn.Module) -> nn.Module:
        model.register_forward_hook(self.hook)
        return model


READY = step.WARM_UP + 1 + QUICK.losses  # forwards before the first sample


@pytest.mark.parametrize("after", [0, READY - 1, READY + 1], ids=["warm-up", "losses", "second step timed"])
@pytest.mark.parametrize("first", [True, False])
def test_a_failure_is_a_record_and_the_others_go_on(after: int, first: bool) -> None:
    """Even if it leaves nothing to compare with."""
    failing = Failing(after, torch.OutOfMemoryError("no room\nfor this"))
    variants = [TORCH, Variant("wrong", failing), FUSED]
    found = measured(*(variants[1:] if first else variants))
    assert (found["wrong"].status, found["wrong"].note) == (CANNOT, "OutOfMemoryError: no room for this")
    assert failing.calls == after + 1  # it is not asked again
    assert found["wrong"].us is found["wrong"].loss_apart is None
    assert {line.rounds for name, line in found.items() if name != "wrong"} == {3}
    assert (found["fused"].loss_apart is None) == (first and after < READY)


def test_a_graph_begins_where_the_eager_step_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one cannot be captured, the eager steps are still measured."""
    monkeypatch.setattr(step, "MODES", ("eager", "graph"))
    lines = list(measure_steps(SMALL, (4,), stages=((TORCH, FUSED),), effort=QUICK))
    assert [(line.mode, line.status, line.loss_apart) for line in lines] == [
        ("eager", MEASURED, None), ("graph", MEASURED, 0), ("eager", MEASURED, 0), ("graph", MEASURED, 0),
    ]  # fmt: skip
    monkeypatch.setattr(timing, "captured", lambda *_: 1 / 0)
    lines = list(measure_steps(SMALL, (4,), stages=((TORCH,),), effort=QUICK))
    assert [line.status for line in lines] == [MEASURED, CANNOT]


# the job


def test_ratios_are_of_the_same_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    def line(variant: str, us: float | None, stage: int, **given: object) -> Record:
        given = {"mode": "eager", "us": us, "us_low": us, "us_high": us, "suite": f"stage {stage}", **given}
        status, shape = MEASURED if us else CANNOT, "256x3x224x224"
        return Record("step", status, variant, network="ResNet-50", shape=shape, **given)  # type: ignore[arg-type]

    lines = [
        line("torch", 100e3, 1, peak_MB=20_000), line("torch", None, 1, mode="graph", note="no graph"),
        line("fused", 80e3, 1, loss_apart=1e-4, loss_allowed=3e-4), line("fused", 50e3, 1, mode="graph"),
        line("torch", 120e3, 2), line("torch.compile", 90e3, 2),
        line("fused, torch.compile", 123456.7, 2, us_low=123123.4, us_high=123789.0, peak_MB=34567.8),
    ]  # fmt: skip
    assert [*tables.steps(frame(lines))["of torch"]] == ["1.000", "0.800", "-", "1.000", "0.750", "1.029"]
    report.show_steps(frame(lines))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.count("variant") == 1
    assert "Cannot: torch: no graph (1 of them)" in out
    assert "1.0e-04  3.0e-04" in out


def run(folder: Path, *stages: tuple[Variant, ...]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "STAGES", stages)
        patch.setattr(step, "Task", lambda device: SMALL)
        options = ["step", "--device", "cpu", "--out", str(folder), "--batch", "4", "--budget", "99"]
        return step.run(parser().parse_args(options), [])


def test_what_was_measured_before_ctrl_c_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And is on the disk, with what it was measured on. Losses that disagree fail the job."""
    stopped = Variant("stopped", Failing(0, KeyboardInterrupt()))
    assert run(tmp_path, (TORCH, FUSED), (TORCH, stopped)) == 0
    assert "2 of 2 measured" in capsys.readouterr().out
    (file,) = tmp_path.glob("*/step.csv")
    found = records.read(file)
    assert found["variant"].tolist() == ["torch", "fused"]
    assert set(found["gpu"]) == {"made up"}
    assert found["versions"].str.startswith("bnfast=").all()
    assert run(tmp_path, (TORCH, Variant("biased", biased))) == 1
