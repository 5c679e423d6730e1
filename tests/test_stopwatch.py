"""How the probes of the GPU share out their time: rounds in turn, spreads, budgets."""

from __future__ import annotations

import pytest
import torch

from benchmarks import stopwatch
from tests.support.clock import Clock


def test_a_spread_is_median_and_quartiles() -> None:
    assert stopwatch.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == stopwatch.Spread(3.0, 2.0, 4.0, 5)


def test_all_take_turns_and_only_work_is_timed() -> None:
    clock, order = Clock(), []

    def timed(name: str, microseconds: float, calls: int) -> stopwatch.Timed:
        def work() -> None:
            order.append(name)
            clock.work(microseconds * calls)

        return stopwatch.Timed(work, calls, lambda: clock.work(7))

    todo = {"a": timed("a", 3, calls=2), "b": timed("b", 5, calls=1)}
    samples = stopwatch.in_turn(todo, clock.stopwatch, stopwatch.Budget(1e9), rounds=3)
    assert samples == {"a": [3] * 3, "b": [5] * 3}
    assert order == (["a", "b", "b", "a"] * (3 + stopwatch.WARM_UP))[: 2 * (3 + stopwatch.WARM_UP)]


def test_rounds_end_with_the_budget_but_are_never_too_few() -> None:
    clock = Clock()

    def rounds(seconds: float) -> int:
        budget = stopwatch.Budget(seconds, lambda: clock.now)
        todo = {"a": stopwatch.Timed(lambda: clock.work(1))}
        return len(stopwatch.in_turn(todo, clock.stopwatch, budget, 20)["a"])

    assert [rounds(1), rounds(10 + stopwatch.WARM_UP), rounds(1000)] == [stopwatch.FEWEST_ROUNDS, 10, 20]


class Gpu:
    """Waits for 5000 us and does each piece of work in 10, beside a host that takes `launch` to queue one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch: float) -> None:
        self.host = self.done = 0.0
        self.launch = launch
        for name in ("Event", "synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def synchronize(self) -> None:
        self.host = self.done = max(self.host, self.done)

    def _sleep(self, cycles: int) -> None:
        self.done = self.host + cycles / 2000

    def work(self) -> None:
        self.host += self.launch
        self.done = max(self.host, self.done) + 10

    def Event(self, enable_timing: bool) -> Mark:
        assert enable_timing
        return Mark(self)


class Mark:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.time = gpu, 0.0

    def record(self) -> None:
        self.time = max(self.gpu.host, self.gpu.done)

    def query(self) -> bool:
        return self.time <= self.gpu.host

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.time)

    def elapsed_time(self, later: Mark) -> float:
        return (later.time - self.time) / 1e3


@pytest.mark.parametrize(("calls", "launch", "us", "late"), [
    (16, 300, 10, ""), (10, 10, 10, ""), (16, 400, 88.125, "3 of 3 readings may be the host's time"),
])  # fmt: skip
def test_a_gpu_is_read_and_not_the_host_or_it_is_told(
    calls: int, launch: float, us: float, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel takes 10 us, and that is what is read, as long as the host queues all of them within the 5 ms
    that the GPU waits at first."""
    gpu = Gpu(monkeypatch, launch)

    def work() -> None:
        for _ in range(calls):
            gpu.work()

    (found,) = stopwatch.in_turn({0: stopwatch.Timed(work, calls)}, stopwatch.on_gpu, rounds=3).values()
    assert found == pytest.approx([us] * 3)
    assert stopwatch.lateness(found) == late


def test_a_rotation_is_cold_in_the_largest_cache_there_is() -> None:
    """An H200's L2 has 60 MB, and a buffer must not find a line of its last use in there."""
    assert stopwatch.COLD_BYTES >= 4 * 60 * 1024**2
    for size in (1000, 2**20, 2**28, 2**40):
        assert (stopwatch.rotation(size) - 1) * size >= stopwatch.COLD_BYTES
        assert stopwatch.rotation(size) >= 2


def test_a_budget_is_shared_out_and_spent() -> None:
    clock = Clock()
    budget = stopwatch.Budget(100, lambda: clock.now)
    share = budget.share(4)
    assert share is not None
    clock.work(24)
    assert not share.spent()
    clock.work(1)
    assert share.spent()
    assert not budget.spent()
    clock.work(75)
    assert budget.share(1) is None


def test_what_empties_a_cache_reads_as_much_as_lies_between_two_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "COLD_BYTES", 4096)
    assert float(stopwatch.evicting(torch.device("cpu"))()) == 1024  # type: ignore[arg-type]  # a sum of ones


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_budget_of_nothing_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"seconds is {seconds}; .* more than 0"):
        stopwatch.Budget(seconds)


def test_one_sample_is_its_own_quartiles() -> None:
    assert stopwatch.Spread.of([3.0]) == stopwatch.Spread(3.0, 3.0, 3.0, 1)
    with pytest.raises(ValueError, match="samples are empty"):
        stopwatch.Spread.of([])
