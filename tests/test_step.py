"""The training step of a whole network: its losses, its times, its budget, and what becomes of a failure."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfast
from benchmarks import records, resnet, step
from benchmarks.__main__ import parser
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.resnet import COMPILED, PLAIN, TORCH, Variant
from benchmarks.step import Effort, measure_steps
from tests.support.steps import CPU, QUICK, SMALL, TASK, biased, eager, measured

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_torch_in_one_thread")]


# what is trained


def test_norms_are_as_people_train_them() -> None:
    model = resnet.network(replace(TASK, dtype=torch.bfloat16))
    kinds = {type(m): {t.dtype for t in m.parameters()} for m in model.modules() if not list(m.children())}
    assert kinds[nn.BatchNorm2d] == {torch.float32}
    assert kinds[nn.Conv2d] == kinds[nn.Linear] == {torch.bfloat16}
    assert model[0][1].running_var.dtype == torch.float32


def test_variants_are_what_they_are_called() -> None:
    made = {(v.name, v.norms): v.change(resnet.network(TASK)) for v in PLAIN}
    assert len(bnfast.fusion_report(made["fused", True]).fused) == 49
    assert sum(type(m) is bnfast.BatchNorm2d for m in made["converted", True].modules()) == 53
    assert sum(type(m) is nn.BatchNorm2d for m in made["torch", True].modules()) == 53
    bare = {type(m) for m in made["torch", False].modules()}
    assert not any("Norm" in kind.__name__ for kind in bare)
    assert made["torch", True][0][1].weight.equal(made["fused", True][0][1].weight)


def test_a_network_without_norms_stays_finite() -> None:
    bare = PLAIN[-1]
    training = resnet.Step(bare, TASK, *resnet.batch_of(TASK, 2))
    losses = [training().item() for _ in range(4)]  # the most before its weights are set back
    assert all(0.1 < loss < 10 for loss in losses)


@pytest.mark.usefixtures("shallow")
def test_reset_goes_back_to_the_first_step() -> None:
    """In the same memory, momentum and running statistics included."""
    training = resnet.Step(TORCH, SMALL, *resnet.batch_of(SMALL, 4))
    first = resnet.curve(training, training, 5)
    address = next(training.model.parameters()).data_ptr()
    assert resnet.curve(training, training, 5).equal(first)
    assert next(training.model.parameters()).data_ptr() == address
    assert first[-1] < first[0]
    weights, norm = sum(p.nbytes for p in training.model.parameters()), training.model[1]
    assert training.nbytes() == 2 * weights + norm.running_mean.nbytes * 2 + norm.num_batches_tracked.nbytes


# losses


def test_losses_of_all_variants_agree_in_fp32() -> None:
    """ResNet-50, narrow; and what a record of it says."""
    lines = measured(*PLAIN, effort=Effort(rounds=1, steps=1, losses=2, orders=1), task=TASK)
    assert [(line.variant, line.mode, line.norm) for line in lines] == [
        (variant.name, mode, "BatchNorm" if variant.norms else "none")
        for variant, mode in itertools.product(PLAIN, ("eager", "graph"))
    ]
    found = eager(lines)
    assert step.disagreeing(lines) == []
    assert found["torch"].loss_apart is None
    for name in ("fused", "converted"):
        assert found[name].loss_apart <= found[name].loss_allowed < 0.01
        assert found[name].ran == "plain torch"
    first = found["torch"]
    assert (first.kind, first.status, first.ran, first.dtype) == ("step", MEASURED, "Native", "fp32")
    assert (first.network, first.shape) == ("ResNet-50 of width 8, 10 classes", "4x3x32x32")
    assert all(line.us > 0 for line in lines if line.mode == "eager")
    assert {(line.status, line.note) for line in lines if line.mode == "graph"} == {
        (CANNOT, "RuntimeError: a CUDA graph needs CUDA")
    }


@pytest.mark.usefixtures("shallow")
def test_a_layer_that_is_wrong_in_the_tenth_digit_is_found() -> None:
    lines = measured(TORCH, Variant("biased", biased), Variant("converted", bnfast.convert))
    (fault,) = step.disagreeing(lines)
    assert fault.startswith("biased (eager, 4x3x8x8): losses ")
    assert 0 < eager(lines)["biased"].loss_allowed < 1e-13


def test_nan_is_a_difference_wherever_it_is() -> None:
    right = torch.tensor([1.0, 2.0, 3.0])
    wrong = torch.tensor([1.0, math.nan, 3.0])
    assert resnet.apart(right, right) == 0
    assert math.isnan(resnet.apart(wrong, right))
    line = Record("step", MEASURED, "x", loss_apart=math.nan, loss_allowed=1.0)
    assert step.disagreeing([line])
    assert step.disagreeing([replace(line, loss_apart=0.5, loss_allowed=math.nan)])


@pytest.mark.usefixtures("shallow")
def test_another_order_is_the_same_problem_and_put_back() -> None:
    x, labels = resnet.batch_of(SMALL, 8)
    given = x.clone(), labels.clone()
    training = resnet.Step(TORCH, SMALL, x, labels)
    limit = resnet.allowed(training, x, labels, resnet.curve(training, training, 3), orders=2)
    assert 6e-16 < limit < 1e-13
    assert x.equal(given[0])
    assert labels.equal(given[1])


# time


def slowed(seconds: float) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.register_forward_hook(lambda *_: time.sleep(seconds))
        return model

    return change


@pytest.mark.usefixtures("shallow")
def test_a_slower_variant_is_reported_slower_by_as_much() -> None:
    """Told by the clock that a CPU has."""
    found = eager(measured(TORCH, Variant("slowed", slowed(0.05))))
    assert found["slowed"].us_low >= 50_000
    assert found["torch"].us < 50_000
    assert found["slowed"].us_low <= found["slowed"].us <= found["slowed"].us_high


@pytest.mark.usefixtures("shallow")
def test_rounds_go_over_all_and_begin_with_each_in_turn() -> None:
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

    found = eager(measured(noting("a"), noting("b"), stopwatch=stopwatch))
    assert "".join(seen).endswith("a1<a2a3>b1<b2b3>b1<b2b3>a1<a2a3>a1<a2a3>b1<b2b3>")
    a, b = (found[name] for name in "ab")
    assert (a.us, a.us_low, a.us_high, a.rounds) == (150, 100, 200, 3)  # 100, 300, 500 for two steps
    assert b.us == 1


# budget and failures


class Ticking:
    """A clock on which everything takes a second."""

    def __init__(self) -> None:
        self.now = -1.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.usefixtures("shallow")
def test_nothing_is_begun_after_the_budget() -> None:
    """What was made ready in time is measured, in few rounds."""
    clock, ticks = Ticking(), []
    many = replace(QUICK, rounds=50)
    stages = ((TORCH, Variant("fused", bnfast.fuse), Variant("converted", bnfast.convert)),) * 2
    found = measure_steps(
        SMALL, (4, 2), 3, stages, many, clock=clock, tick=lambda: ticks.append(1)
    )  # fmt: skip
    lines = [line for line in found if line.mode == "eager"]
    assert [line.status for line in lines] == [MEASURED] * 2 + [CANNOT] * 10
    assert {line.rounds for line in lines[:2]} == {3}
    assert {line.note for line in lines[2:]} == {"no time left"}
    assert clock.now < 20
    assert len(ticks) < step.ticks((4, 2), stages, many) == 4 * (3 + 50)


@pytest.mark.usefixtures("shallow")
def test_without_a_budget_all_rounds_are_done() -> None:
    ticks: list[int] = []
    lines = measured(TORCH, clock=Ticking(), effort=replace(QUICK, rounds=7), tick=lambda: ticks.append(1))
    assert eager(lines)["torch"].rounds == 7
    assert len(ticks) == step.ticks((4,), ((TORCH,),), replace(QUICK, rounds=7))


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


READY = resnet.WARM_UP + 1 + QUICK.losses  # forwards before the first sample


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("after", [0, READY - 1, READY + 1], ids=["warm-up", "losses", "second step timed"])
def test_a_failure_is_a_record_and_the_others_go_on(after: int) -> None:
    failing = Failing(after, torch.OutOfMemoryError("no room\nfor this"))
    lines = measured(TORCH, Variant("wrong", failing), Variant("fused", bnfast.fuse))
    found = eager(lines)
    assert (found["wrong"].status, found["wrong"].note) == (CANNOT, "OutOfMemoryError: no room")
    assert failing.calls == after + 1  # it is not asked again
    assert found["wrong"].us is found["wrong"].loss_apart is None
    assert [found[name].rounds for name in ("torch", "fused")] == [3, 3]
    assert found["fused"].loss_apart is not None


@pytest.mark.usefixtures("shallow")
def test_others_are_timed_though_there_is_nothing_to_compare_with() -> None:
    lines = measured(Variant("torch", Failing(0, ValueError("broken"))), Variant("fused", bnfast.fuse))
    found = eager(lines)
    assert found["torch"].note == "ValueError: broken"
    assert found["fused"].status == MEASURED
    assert found["fused"].loss_apart is found["fused"].loss_allowed is None


@pytest.mark.usefixtures("shallow")
def test_ctrl_c_keeps_what_was_measured() -> None:
    stages = ((TORCH, Variant("stopped", Failing(READY + 1, KeyboardInterrupt())), TORCH),)
    measuring = measure_steps(SMALL, (4, 2), stages=stages, effort=QUICK)
    lines = [next(measuring) for _ in range(6)]
    with pytest.raises(KeyboardInterrupt):
        next(measuring)
    found = [(each.status, each.rounds, each.note) for each in lines if each.mode == "eager"]
    assert found == [(MEASURED, 1, ""), (CANNOT, None, "stopped"), (CANNOT, None, "stopped")]


@pytest.mark.usefixtures("shallow")
def test_a_graph_begins_where_the_eager_step_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step itself where its graph would be."""
    monkeypatch.setattr(resnet, "captured", lambda training, pool: training)
    lines = measured(TORCH, Variant("fused", bnfast.fuse))
    assert [line.status for line in lines] == [MEASURED] * 4
    assert [line.loss_apart for line in lines] == [None, 0, 0, 0]


@pytest.mark.parametrize(("batches", "budget", "named"), [
    ((), None, "batches"), ((4, 0), None, "batches"), ((4,), 0, "budget"), ((4,), math.nan, "budget"),
])  # fmt: skip
def test_bad_arguments_are_named(batches: tuple[int, ...], budget: float | None, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must be"):
        next(measure_steps(SMALL, batches, budget))


# the job


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
    assert step.rows(lines)[["of torch", "norms"]].to_numpy().tolist() == [
        ["1.000", "40.0%"], ["", ""], ["0.800", "25.0%"], ["0.600", ""],
        ["1.000", "50.0%"], ["0.750", "50.0%"], ["0.500", "25.0%"], ["0.375", ""],
    ]  # fmt: skip
    wide = replace(lines[-1], us=123456.7, us_low=123123.4, us_high=123789.0, peak_MB=34567.8)
    step.show([*lines, wide], step.TIMES)
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
    monkeypatch.setattr(step, "plan", lambda *_: (SMALL, (4,), (PLAIN[:3],), QUICK))
    assert step.run(options(tmp_path), []) == 0
    out = capsys.readouterr().out
    assert "Without a GPU there is no step time of ResNet-50" in out
    assert "PASS     step 3 of 6 measured, all losses agree (a tiny network; step times need a GPU)" in out
    assert " ms " not in out
    (file,) = tmp_path.glob("*/step.csv")
    assert records.read(file)["variant"].tolist() == [v.name for v in PLAIN[:3] for _ in range(2)]
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("shallow")
def test_disagreement_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = ((TORCH, Variant("biased", biased)),)
    monkeypatch.setattr(step, "plan", lambda *_: (SMALL, (4,), stages, QUICK))
    assert step.run(options(tmp_path), []) == 1


def test_the_plan_of_a_cpu_and_of_a_gpu() -> None:
    class Here:
        gpu, device = False, CPU

    task, _, stages, _ = step.plan(Here, (256,))  # type: ignore[arg-type]
    assert task.dtype == torch.float64
    assert str(task) != "ResNet-50"
    Here.gpu = True
    task, batches, stages, _ = step.plan(Here, (64, 8))  # type: ignore[arg-type]
    assert (str(task), task.dtype, batches, stages) == (
        "ResNet-50",
        torch.bfloat16,
        (64, 8),
        (PLAIN, COMPILED),
    )


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert options(tmp_path).batch == list(step.BATCHES)
    given = options(tmp_path, "--batch", "64", "8", "--budget", "120")
    assert (given.batch, given.budget) == ([64, 8], 120)
    with pytest.raises(SystemExit):
        options(tmp_path, "--batch", "0")
    assert "--batch: '0' is no whole number above 0" in capsys.readouterr().err
