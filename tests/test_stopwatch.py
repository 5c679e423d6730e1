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
