"""The benchmarks are honest: known times come out as they are, slower is reported slower, copies are seen,
wrong results are not timed, and what fails is named. On a CPU, with clocks that a test decides about."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, fairness, measure, tables, timing
from benchmarks.baselines import Baseline, Provider
from benchmarks.records import CANNOT, MEASURED, Record, frame
from codegen.cases import Case
from tests.support.clock import Clock

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
Change = Callable[[Tensor], Tensor]
QUICK = measure.Method(rounds=5, stopwatch=timing.on_host)
BATCH = Case("BatchNorm", (4, 8, 6, 6), 0, torch.float32, True, "relu", True)
GROUP = Case("GroupNorm", (4, 8, 6, 6), 4, torch.bfloat16, False, "silu")
INSTANCE = Case("InstanceNorm", (4, 8, 6, 6), 8, torch.float32, False, "leaky_relu")
EVERY = pytest.mark.parametrize("case", [BATCH, GROUP, INSTANCE], ids=str)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """bnfast's layers compute at a CPU's speed; and two buffers are a rotation."""
    monkeypatch.setattr("bnfast.dispatch.INTERPRET", False)
    monkeypatch.setattr(timing, "COLD_BYTES", 1)


def altered(name: str, change: Change) -> Baseline:
    """torch's layer with something done to what it returns."""

    def build(case: Case, device: torch.device) -> Provider:
        (torchs,) = measure.get(["torch"])
        given = torchs.build(case, device)
        return dataclasses.replace(given, forward=lambda x, z: change(given.forward(x, z)))

    return Baseline(name, "", baselines.anything, build)


def measured(case: Case, *others: Baseline, **method: object) -> list[Record]:
    how = dataclasses.replace(QUICK, **method)
    return list(measure.of_case(case, [*measure.get(["bnfast", "torch"]), *others], CPU, how))


class Changed(torch.autograd.Function):
    """change: what is done to y, or else to its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, change: Change, back: Change) -> Tensor:
        ctx.back = back
        return change(y).view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(dy), None, None


def test_a_known_time_is_told() -> None:
    """A sleep of 5 ms in each forward, and no other clock than the real one."""
    slept = altered("slept", lambda y: (time.sleep(0.005), y)[1])
    found = measured(BATCH, slept, caches=("cold",), directions=("forward",))
    (record,) = (r for r in found if r.variant == "slept")
    # a busy machine may take its time, but not 20 times
    assert 5000 <= (record.us_low or 0) <= (record.us or 0) <= 100_000


def takes(clock: Clock, name: str, forward: float, backward: float) -> Baseline:
    """Time that forwards and backwards are said to take: microseconds a call."""

    def waits(us: float) -> Change:
        return lambda t: (clock.work(us), t)[1]

    return altered(name, lambda y: Changed.apply(y, waits(forward), waits(backward)))


@EVERY
def test_forward_and_backward_are_timed_apart_and_a_slower_one_is_reported_slower(case: Case) -> None:
    clock = Clock()
    method = dataclasses.replace(QUICK, stopwatch=clock.stopwatch)
    todo = [takes(clock, "bnfast", 10, 40), takes(clock, "slower", 15, 80)]
    found = list(measure.of_case(case, todo, CPU, method))
    assert {(r.variant, r.direction, r.cache): r.us for r in found} == {
        (name, direction, cache): us
        for cache in ("cold", "warm")
        for name, direction, us in (
            ("bnfast", "forward", 10), ("bnfast", "backward", 40),
            ("slower", "forward", 15), ("slower", "backward", 80),
        )
    }  # fmt: skip
    (table,) = tables.measured(frame(found), "backward")
    assert table["slower x"].tolist() == ["2.00", "2.00"]


def test_small_layers_are_timed_in_few_calls_and_find_the_cache_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rotation of them would outlast the head start, and the time be the host's. In few, what came just
    before the clock started is the eviction, of COLD_BYTES; after the forward, where a backward is timed."""
    events: list[str] = []

    def forward(y: Tensor) -> Tensor:
        events.append("forward")
        return y

    def watch(work: timing.Work) -> float:
        events.append("start")
        work()
        events.append("end")
        return 1.0

    monkeypatch.setattr(timing, "evicting", lambda device: lambda: events.append("evict"))
    method = dataclasses.replace(QUICK, caches=("cold",), stopwatch=watch)
    monkeypatch.setattr(timing, "COLD_BYTES", 100 * BATCH.x_bytes)
    list(measure.of_case(BATCH, [altered("small", forward)], CPU, method))
    starts = [i for i, event in enumerate(events) if event == "start"]
    assert len(starts) == 2 * (QUICK.rounds + timing.WARM_UP)
    assert {events[i - 1] for i in starts} == {"evict"}
    assert {events[i:].index("end") - 1 for i in starts} == {measure.MOST_COLD_CALLS, 0}
    events.clear()
    monkeypatch.setattr(timing, "COLD_BYTES", 10 * BATCH.x_bytes)
    list(measure.of_case(BATCH, [altered("large", forward)], CPU, method))
    assert "evict" not in events


@EVERY
def test_providers_are_right_and_copy_nothing(case: Case) -> None:
    for baseline in measure.get(["bnfast", "torch", "native"]):
        provider = baseline.build(case, CPU)
        found = fairness.step(provider, case, CPU)
        assert fairness.checked(found, case, CPU) is None, baseline.name
        assert fairness.strayed(found, case) == "", baseline.name
        assert fairness.copies(provider, case, CPU) == 0, baseline.name


@pytest.mark.parametrize("copy", [
    lambda y: y.clone(), lambda y: y.double().to(y.dtype),
    lambda y: y.contiguous(memory_format=torch.channels_last).contiguous(),
], ids=["clone", "cast", "layout"])  # fmt: skip
def test_a_hidden_copy_is_found(copy: Change) -> None:
    case = dataclasses.replace(GROUP, shape=(4, 8, 24, 24))
    found = measured(case, altered("hidden", copy))
    copied = {r.variant: r.copied_MB for r in found if r.direction == "forward"}
    assert (copied["torch"], copied["bnfast"]) == (0, 0)
    assert (copied["hidden"] or 0) >= case.x_bytes / 1e6


@EVERY
@pytest.mark.parametrize(("change", "named"), [
    (lambda y: y * 1.5, "y"), (lambda y: y.flip(0), "y"), (lambda y: torch.relu(y - 0.5), "y"),
    (lambda y: y * 1.05, "y"),
    (lambda y: Changed.apply(y, lambda y: y, lambda dy: dy * 1.2), "dx"),
], ids=["*", "flip", "relu", "slightly", "gradient"])  # fmt: skip
def test_wrong_results_are_not_timed(case: Case, change: Change, named: str) -> None:
    found = [r for r in measured(case, altered("wrong", change)) if r.variant == "wrong"]
    assert [r.status for r in found] == [CANNOT]
    assert f"its results are wrong: {named} is off by" in found[0].note


def test_gradients_that_are_all_zero_are_right_and_nan_is_not() -> None:
    """One element a group: y is the bias, and x has no part in it."""
    case = dataclasses.replace(GROUP, shape=(2, 4, 1, 1), activation=None)
    found = fairness.step(measure.get(["torch"])[0].build(case, CPU), case, CPU)
    assert not found["dx"].any()
    assert fairness.checked(found, case, CPU) is None
    for wrong in (1e-3, float("nan")):
        assert "dx is off by" in (fairness.checked(found | {"dx": found["dx"] + wrong}, case, CPU) or "")


def test_another_layout_is_told() -> None:
    found = measured(BATCH, altered("strayed", lambda y: y.contiguous()))
    assert {r.note for r in found if r.variant == "strayed"} == {"not channels_last, as x is: y"}
    assert {r.note for r in found if r.variant != "strayed"} == {""}


def test_one_that_fails_is_named_and_the_others_go_on() -> None:
    def fail(y: Tensor) -> Tensor:
        raise RuntimeError("no\nsuch kernel")

    found = measured(BATCH, altered("failing", fail))
    (failed,) = (r for r in found if r.variant == "failing")
    assert (failed.status, failed.note) == (CANNOT, "RuntimeError: no such kernel")
    assert {r.variant for r in found if r.status == MEASURED} == {"bnfast", "torch"}


@EVERY
def test_all_are_given_the_same(case: Case) -> None:
    """Tensors, parameters and running statistics; x is not zeros, and has the layout that is named."""
    x = case.tensor(CPU, 0)
    assert x.is_contiguous(memory_format=case.memory_format)
    assert 0.5 < x.double().std() < 1.5
    providers = [b.build(case, CPU) for b in measure.get(["bnfast", "torch", "native", "compile"])]
    for other in providers[1:]:
        for a, b in zip(providers[0].parameters, other.parameters, strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()


def test_what_cannot_run_here_says_why() -> None:
    for name in ("cudnn-op", "cudnn-frontend"):
        (baseline,) = measure.get([name])
        for case in (BATCH, GROUP, INSTANCE):
            assert baseline.unable(case, CPU)
    with pytest.raises(ValueError, match="names must be of bnfast, torch.*got nobody"):
        measure.get(["torch", "nobody"])


@pytest.mark.parametrize(("case", "direction", "passes"), [
    (BATCH, "forward", 4), (BATCH, "backward", 6), (GROUP, "forward", 2), (GROUP, "backward", 3),
    (dataclasses.replace(BATCH, residual=False), "backward", 5),
    (dataclasses.replace(GROUP, shape=(4, 8, 256, 256)), "forward", 3),
    (dataclasses.replace(GROUP, shape=(4, 8, 256, 256)), "backward", 5),
])  # fmt: skip
def test_floor(case: Case, direction: str, passes: int) -> None:
    assert measure.floor_bytes(case, direction) == passes * case.x_bytes


def test_torch_compile_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked as all are, but for copies, which nobody can count there; forgotten once a case."""
    forgotten: list[None] = []
    reset = torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: (forgotten.append(None), reset())[1])
    found = measured(BATCH, *measure.get(["compile", "compile-max"]), caches=("cold",))
    assert {(r.variant, r.status, r.copied_MB) for r in found} == {
        ("bnfast", MEASURED, 0.0), ("torch", MEASURED, 0.0), ("compile", MEASURED, None),
        ("compile-max", MEASURED, None),
    }, [r.note for r in found]  # fmt: skip
    assert len(forgotten) == 1
