"""The benchmarks are honest: known times come out as they are, slower is reported slower, copies are seen,
wrong results are not timed, and what fails is named. On a CPU, with clocks that a test decides about."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, fairness, measure, tables, timing
from benchmarks.baselines import Baseline, Provider, inputs
from benchmarks.records import CANNOT, MEASURED, Record, frame
from codegen.cases import Case
from tests.support.clock import Clock

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
Change = Callable[[Tensor], Tensor]
QUICK = measure.Method(rounds=5, stopwatch=timing.on_host)
COLD = dataclasses.replace(QUICK, caches=("cold",))
BATCH = Case("BatchNorm", (4, 8, 6, 6), 0, torch.float32, True, "relu", True)
GROUP = Case("GroupNorm", (4, 8, 6, 6), 4, torch.bfloat16, False, "silu")
INSTANCE = Case("InstanceNorm", (4, 8, 6, 6), 8, torch.float32, False, "leaky_relu")
EVERY = pytest.mark.parametrize("case", [BATCH, GROUP, INSTANCE], ids=str)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """bnfast's layers compute at a CPU's speed; and one buffer is enough."""
    monkeypatch.setattr("bnfast.dispatch.INTERPRET", False)
    monkeypatch.setattr(timing, "COLD_BYTES", 1)


# how time is read


def test_a_spread_is_median_and_quartiles() -> None:
    """One sample is its own quartiles."""
    assert timing.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Spread(3.0, 2.0, 4.0, 5)
    assert timing.Spread.of([3.0]) == timing.Spread(3.0, 3.0, 3.0, 1)


def test_all_take_turns_and_only_work_is_timed() -> None:
    clock, order = Clock(), []

    def timed(name: str, microseconds: float, calls: int) -> timing.Timed:
        def work() -> None:
            order.append(name)
            clock.work(microseconds * calls)

        return timing.Timed(work, calls, lambda: clock.work(7))

    todo = {"a": timed("a", 3, calls=2), "b": timed("b", 5, calls=1)}
    samples = timing.in_turn(todo, clock.stopwatch, 3)
    assert samples == {"a": [3] * 3, "b": [5] * 3}
    assert order == (["a", "b", "b", "a"] * (3 + timing.WARM_UP))[: 2 * (3 + timing.WARM_UP)]


class Gpu:
    """Waits for 5000 us and does each piece of work in 10, beside a host that takes `launch` to queue one."""

    def __init__(self, launch: float) -> None:
        self.host = self.done = 0.0
        self.launch = launch

    def synchronize(self) -> None:
        self.host = self.done = max(self.host, self.done)

    def sleep(self, cycles: int) -> None:
        self.done = self.host + cycles / 2000

    def work(self) -> None:
        self.host += self.launch
        self.done = max(self.host, self.done) + 10

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(synchronize=self.synchronize)
        event.record = lambda: setattr(event, "time", max(self.host, self.done))
        event.query = lambda: event.time <= self.host
        event.elapsed_time = lambda later: (later.time - event.time) / 1e3
        return event


@pytest.mark.parametrize(("calls", "launch", "us", "late"), [
    (16, 300, 10, ""), (10, 10, 10, ""), (16, 400, 88.125, "3 of 3 readings may be the host's time"),
])  # fmt: skip
def test_a_gpu_is_read_and_not_the_host_or_it_is_told(
    calls: int, launch: float, us: float, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel takes 10 us, and that is what is read, as long as the host queues all of them within the 5 ms
    that the GPU waits at first."""
    gpu = Gpu(launch)
    for name, value in {"Event": gpu.event, "synchronize": gpu.synchronize, "_sleep": gpu.sleep}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    work = timing.Timed(timing.repeated(gpu.work, calls), calls)
    (found,) = timing.in_turn({0: work}, timing.on_gpu, 3).values()
    assert found == pytest.approx([us] * 3)
    assert timing.lateness(found) == late


def test_what_empties_a_cache_reads_more_than_the_largest_one_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200's L2 has 60 MB."""
    monkeypatch.undo()
    assert timing.COLD_BYTES >= 4 * 60 * 1024**2
    monkeypatch.setattr(timing, "COLD_BYTES", 4096)
    assert float(timing.evicting(CPU)()) == 1024  # type: ignore[arg-type]  # a sum of ones


# what is timed


class Changed(torch.autograd.Function):
    """change: what is done to y, or else to its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, change: Change, back: Change) -> Tensor:
        ctx.back = back
        return change(y).view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(dy), None, None


def altered(name: str, change: Change) -> Baseline:
    """torch's layer with something done to what it returns."""

    def build(case: Case, device: torch.device) -> Provider:
        given = baselines.torchs(case, device)
        return dataclasses.replace(given, forward=lambda x, z: change(given.forward(x, z)))

    return Baseline(name, "", build)


def measured(case: Case, *others: Baseline, method: measure.Method = COLD) -> list[Record]:
    return list(measure.of_case(case, [*measure.get(["bnfast", "torch"]), *others], CPU, method))


def test_a_known_time_is_told() -> None:
    """A sleep of 5 ms in each forward, and no other clock than the real one."""
    found = measured(BATCH, altered("slept", lambda y: (time.sleep(0.005), y)[1]))
    (record,) = (r for r in found if (r.variant, r.direction) == ("slept", "forward"))
    # a busy machine may take its time, but not 20 times
    assert 5000 <= (record.us_low or 0) <= (record.us or 0) <= 100_000


@EVERY
def test_forward_and_backward_are_timed_apart_and_a_slower_one_is_reported_slower(case: Case) -> None:
    clock = Clock()

    def takes(name: str, forward: float, backward: float) -> Baseline:
        waits = [lambda t, us=us: (clock.work(us), t)[1] for us in (forward, backward)]
        return altered(name, lambda y: Changed.apply(y, *waits))

    method = dataclasses.replace(QUICK, stopwatch=clock.stopwatch)
    found = list(measure.of_case(case, [takes("bnfast", 10, 40), takes("slower", 15, 80)], CPU, method))
    assert {(r.variant, r.direction, r.cache): r.us for r in found} == {
        (name, direction, cache): us
        for cache in ("cold", "warm")
        for name, direction, us in (
            ("bnfast", "forward", 10), ("bnfast", "backward", 40),
            ("slower", "forward", 15), ("slower", "backward", 80),
        )
    }  # fmt: skip
    table = tables.measured(frame(found), "backward")
    assert table["slower x"].tolist() == ["2.00", "2.00"]


@pytest.mark.parametrize(("cold", "calls"), [(100, measure.MOST_COLD_CALLS), (10, 10), (0.5, 1)])
def test_few_calls_are_timed_together_and_find_the_cache_empty(
    cold: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many would outlast the head start, and the time be the host's. What comes just before the clock starts
    is the eviction; after the forward, where a backward is timed. Each call has an input of its own."""
    events: list[object] = []

    def watch(work: timing.Work) -> float:
        events.append("start")
        work()
        events.append("end")
        return 1.0

    def build(case: Case, device: torch.device) -> Provider:
        given = baselines.torchs(case, device)
        return dataclasses.replace(given, forward=lambda x, z: (events.append(x), given.forward(x, z))[1])

    monkeypatch.setattr(timing, "evicting", lambda device: lambda: events.append("evict"))
    monkeypatch.setattr(timing, "COLD_BYTES", int(cold * BATCH.x_bytes))
    list(
        measure.of_case(
            BATCH, [Baseline("watched", "", build)], CPU, dataclasses.replace(COLD, stopwatch=watch)
        )
    )
    names = [event if isinstance(event, str) else "forward" for event in events]
    starts = [i for i, name in enumerate(names) if name == "start"]
    assert len(starts) == 2 * (QUICK.rounds + timing.WARM_UP)
    assert {names[i - 1] for i in starts} == {"evict"}
    assert {names[i:].index("end") - 1 for i in starts} == {calls, 0}
    assert len({id(x) for x in events[starts[0] + 1 : starts[0] + 1 + calls]}) == calls


@pytest.mark.parametrize(("case", "direction", "passes"), [
    (BATCH, "forward", 4), (BATCH, "backward", 6), (GROUP, "forward", 2), (GROUP, "backward", 3),
    (dataclasses.replace(BATCH, residual=False), "backward", 5),
    (dataclasses.replace(GROUP, shape=(4, 8, 256, 256)), "forward", 3),
    (dataclasses.replace(GROUP, shape=(4, 8, 256, 256)), "backward", 5),
])  # fmt: skip
def test_floor(case: Case, direction: str, passes: int) -> None:
    assert measure.floor_bytes(case, direction) == passes * case.x_bytes


# who is timed


@EVERY
def test_providers_are_right_copy_nothing_and_are_given_the_same(case: Case) -> None:
    """Tensors that are not zeros, and parameters, each in memory of its own."""
    assert 0.5 < inputs(case, CPU)[0].double().std() < 1.5
    found = measured(case, *measure.get(["native"]))
    assert {(r.variant, r.status, r.copied_MB, r.note) for r in found} == {
        (name, MEASURED, 0.0, "") for name in ("bnfast", "torch", "native")
    }
    first, *others = (b.build(case, CPU).parameters for b in measure.get(["bnfast", "torch", "compile"]))
    for a, b in (pair for other in others for pair in zip(first, other, strict=True)):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("copy", [
    lambda y: y.clone(), lambda y: y.double().to(y.dtype),
    lambda y: y.contiguous(memory_format=torch.channels_last).contiguous(),
], ids=["clone", "cast", "layout"])  # fmt: skip
def test_a_hidden_copy_is_found(copy: Change) -> None:
    case = dataclasses.replace(GROUP, shape=(4, 8, 24, 24))
    copied = {r.variant: r.copied_MB for r in measured(case, altered("hidden", copy))}
    assert (copied["torch"], copied["bnfast"]) == (0, 0)
    assert (copied["hidden"] or 0) >= case.x_bytes / 1e6


@EVERY
@pytest.mark.parametrize(("change", "named"), [
    (lambda y: y * 1.5, "y"), (lambda y: y.flip(0), "y"), (lambda y: torch.relu(y - 0.5), "y"),
    (lambda y: y * 1.05, "y"),
    (lambda y: Changed.apply(y, lambda y: y, lambda dy: dy * 1.2), "dx"),
], ids=["*", "flip", "relu", "slightly", "gradient"])  # fmt: skip
def test_wrong_results_are_not_timed(case: Case, change: Change, named: str) -> None:
    (found,) = measure.of_case(case, [altered("wrong", change)], CPU, COLD)
    assert found.status == CANNOT
    assert f"its results are wrong: {named} is off by" in found.note


def test_gradients_that_are_all_zero_are_right_and_nan_is_not() -> None:
    """One element a group: y is the bias, and x has no part in it."""
    case = dataclasses.replace(GROUP, shape=(2, 4, 1, 1), activation=None)
    found = fairness.step(baselines.torchs(case, CPU), case, CPU)
    assert not found["dx"].any()
    assert fairness.checked(found, case, CPU) is None
    for wrong in (1e-3, float("nan")):
        assert "dx is off by" in (fairness.checked(found | {"dx": found["dx"] + wrong}, case, CPU) or "")


def test_another_layout_is_told_and_what_fails_is_named_and_the_others_go_on() -> None:
    def fail(y: Tensor) -> Tensor:
        raise RuntimeError("no\nsuch kernel")

    found = measured(BATCH, altered("strayed", lambda y: y.contiguous()), altered("failing", fail))
    assert {(r.variant, r.status, r.note) for r in found} == {
        ("bnfast", MEASURED, ""), ("torch", MEASURED, ""),
        ("strayed", MEASURED, "not channels_last, as x is: y"),
        ("failing", CANNOT, "RuntimeError: no such kernel"),
    }  # fmt: skip


def test_torch_compile_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked as all are, but for copies, which nobody can count there; forgotten once a case."""
    reset = Mock(wraps=torch.compiler.reset)
    monkeypatch.setattr(torch.compiler, "reset", reset)
    found = measured(BATCH, *measure.get(["compile", "compile-max"]))
    assert {(r.variant, r.status, r.copied_MB) for r in found} == {
        ("bnfast", MEASURED, 0.0), ("torch", MEASURED, 0.0), ("compile", MEASURED, None),
        ("compile-max", MEASURED, None),
    }, [r.note for r in found]  # fmt: skip
    reset.assert_called_once()


# captures, with a stand-in for torch.cuda's graphs that ends a failed one as torch does


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The last one is current. A capture has one of its own, which stays the current one where it fails."""
    found = [Mock()]

    @contextlib.contextmanager
    def stream(given: Any) -> Iterator[None]:
        before = len(found)
        found.append(given)
        try:
            yield
        finally:
            del found[before:]

    @contextlib.contextmanager
    def graph(graph: object, pool: object = None) -> Iterator[None]:
        found.append(Mock(captures="all"))
        try:
            yield
        except Exception:
            raise RuntimeError("CUDA error: a previous error during capture") from None
        found.pop()

    replaced = {"current_stream": lambda: found[-1], "Stream": Mock, "CUDAGraph": Mock}
    for name, value in {**replaced, "stream": stream, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_a_provider_whose_capture_fails_is_named_and_the_next_is_captured(
    streams: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not fail in the call before the capture. The reason is its own, and the stream what it was."""
    captured: list[str] = []

    def noted(name: str, y: Tensor) -> Tensor:
        if streams[-1].captures == "all":
            captured.append(name)
            if name == "bad":
                raise ValueError("the reason")
        return y

    monkeypatch.setattr(timing, "is_gpu", lambda device: True)
    method = dataclasses.replace(COLD, directions=(), graph=True)
    both = [altered(name, partial(noted, name)) for name in ("bad", "good")]
    found = list(measure.of_case(BATCH, both, CPU, method))
    assert [(r.variant, r.status, r.mode, r.note) for r in found] == [
        ("bad", CANNOT, "graph", "ValueError: the reason"), ("good", MEASURED, "graph", ""),
    ]  # fmt: skip
    assert found[1].floor_bytes == 10 * BATCH.x_bytes
    assert captured == ["bad", "good"]
    assert len(streams) == 1
