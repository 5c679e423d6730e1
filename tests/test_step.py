"""The training step of a whole network: its losses, its times, its budget, and what becomes of a failure."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import bnfast
from benchmarks import measure, report, resnet, step, tables, timing
from benchmarks.records import CANNOT, MEASURED, Record, frame
from benchmarks.resnet import PLAIN, TORCH, Variant
from benchmarks.step import Effort, measure_steps
from tests.support.made_up_gpu import make_up
from tests.support.steps import QUICK, SMALL, TASK, measured

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("plain_torch_in_one_thread", "shallow", "eager_steps"),
]
FUSED, RESNET50 = PLAIN[1], resnet.resnet50


@pytest.fixture
def eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is made up, where most tests need no graphs."""
    make_up(monkeypatch)
    monkeypatch.setattr(step, "MODES", ("eager",))


def hooked(name: str, hook: Callable[[nn.Module], object]) -> Variant:
    """torch.nn's network with something that is called after each forward."""

    def change(model: nn.Module) -> nn.Module:
        model.register_forward_hook(lambda m, *_: hook(m))
        return model

    return Variant(name, change)


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
    first, *others = measured(
        *PLAIN, effort=Effort(rounds=1, steps=1, losses=2, orders=1), task=TASK
    ).values()
    assert [first.variant, *(line.variant for line in others)] == ["torch", "fused", "converted"]
    assert first.loss_apart is None
    for line in others:
        assert line.loss_apart <= line.loss_allowed < 0.01
    assert (first.kind, first.status, first.dtype, first.mode) == ("step", MEASURED, "fp32", "eager")
    assert (first.network, first.shape) == ("ResNet-50", "4x3x32x32")


class Biased(nn.BatchNorm2d):
    """Wrong in the tenth digit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + 1e-9)


def biased(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = Biased
    return model


def test_a_layer_that_is_wrong_in_the_tenth_digit_is_not_timed() -> None:
    found = measured(TORCH, Variant("biased", biased), FUSED)
    assert [line.status for line in found.values()] == [MEASURED, CANNOT, MEASURED]
    fault = found["biased"]
    assert fault.note.startswith(f"{measure.WRONG}: losses are ")
    assert fault.us is None
    assert 6e-16 < fault.loss_allowed < 1e-13 < fault.loss_apart


def test_nan_is_a_difference_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what is compared, or in what is allowed."""
    right = torch.tensor([1.0, 2.0, 3.0])
    assert step.apart(right, right) == 0
    assert math.isnan(step.apart(torch.tensor([1.0, math.nan, 3.0]), right))
    for name in ("apart", "allowed"):
        with monkeypatch.context() as patch:
            patch.setattr(step, name, lambda *given: math.nan)
            assert measured(TORCH, FUSED)["fused"].status == CANNOT


# time


def test_a_slower_variant_is_reported_slower_by_as_much() -> None:
    found = measured(TORCH, hooked("slowed", lambda model: time.sleep(0.05)))
    assert found["torch"].us < 50_000 <= found["slowed"].us_low <= found["slowed"].us


def test_rounds_go_over_all_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample has its untimed step, then as many as asked for, and begins with the first weights, seen by
    BatchNorm's counter; the figure is a median a step."""
    seen: list[str] = []

    def noting(name: str) -> Variant:
        return hooked(name, lambda model: seen.append(f"{name}{model[1].num_batches_tracked}"))

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
    many = replace(QUICK, rounds=7)
    lines = list(measure_steps(SMALL, (4, 2), 2.5, (PLAIN, PLAIN), many))
    assert [line.status for line in lines] == [MEASURED] * 2 + [CANNOT] * 10
    assert {line.rounds for line in lines[:2]} == {3}
    assert {line.note for line in lines[2:]} == {"TimeoutError: no time left"}
    assert {line.suite for line in lines[:6]} == {"stage 1"} != {line.suite for line in lines[6:]}
    assert measured(TORCH, effort=many)["torch"].rounds == 7


READY = step.WARM_UP + 1 + QUICK.losses  # forwards before the first sample


@pytest.mark.parametrize("after", [0, READY - 1, READY + 1], ids=["warm-up", "losses", "second step timed"])
@pytest.mark.parametrize("first", [True, False])
def test_a_failure_is_a_record_and_the_others_go_on(after: int, first: bool) -> None:
    """Even if it leaves nothing to compare with."""
    calls = itertools.count()

    def fail(model: nn.Module) -> None:
        if next(calls) == after:
            raise torch.OutOfMemoryError("no room\nfor this")

    variants = [TORCH, hooked("wrong", fail), FUSED]
    found = measured(*(variants[1:] if first else variants))
    assert (found["wrong"].status, found["wrong"].note) == (CANNOT, "OutOfMemoryError: no room for this")
    assert next(calls) == after + 1  # it is not asked again
    assert found["wrong"].us is None
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


# the table


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
