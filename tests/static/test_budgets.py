"""The regression gate: bytes, launches, registers, bytes in flight and the width of loads held against
codegen/budgets.csv, and no spills. Host time is held in test_host_time.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks import predict
from bnfast import dispatch
from bnfast.kernels import plan
from codegen import budgets, figures
from codegen.budget_cases import CASES, LAST, layers
from codegen.cases import Case

pytestmark = pytest.mark.static


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_figure_is_worse_than_its_budget(case: Case) -> None:
    budget, found = budgets.read(), figures.of_case(case)
    complaint = budgets.complaint(budgets.changes(figures.lines(case, found), budget))
    assert not complaint, complaint
    for each in itertools.chain(*found.values()):
        assert each.spills == 0, each
    if dispatch.TRITON_VERSION not in budgets.versions(budget):
        pytest.skip(f"{budgets.PATH.name} has no registers of Triton {dispatch.TRITON_VERSION}")


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plan of kernels that keep a quarter of the loads under way, and of twice the programs that reduce."""
    maps, reduce = (
        replace(plan.ELEMENTWISE[0], loads=plan.ELEMENTWISE[0].loads // 4),
        plan.Program(8, 4, 128, 8),
    )
    monkeypatch.setattr(plan, "ELEMENTWISE", (maps, *plan.ELEMENTWISE[1:]))
    monkeypatch.setattr(plan, "REDUCE", (reduce, *plan.REDUCE[1:]))
    caches = (plan.plan_elementwise, plan.plan_reduction)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("worse")
def test_a_worse_plan_is_noticed() -> None:
    (case,) = layers("BatchNorm", (256, 256, 56, 56), last=LAST)
    complaint = budgets.complaint(budgets.changes(figures.lines(case, figures.of_case(case)), budgets.read()))
    assert f"{case}, forward, transform_kernel: KB in flight {dispatch.TRITON_VERSION} was" in complaint
    assert f"{case}, forward, statistics_kernel: bytes was" in complaint
    assert budgets.RENEW in complaint


def test_predictions() -> None:
    forward, backward = predict.records(
        layers("BatchNorm", (256, 256, 56, 56), after=["z + relu"], last=LAST)
    )
    for record, kernels in ((forward, "statistics"), (backward, "gradient_sums")):
        assert record.status == "predicted"
        assert record.ran.startswith(f"{kernels}_kernel ")
        assert record.registers is not None
        assert 32 < record.registers <= 128
        assert record.in_flight_KB is not None
        assert 40 < record.in_flight_KB < 100
        assert record.versions == f"triton {dispatch.TRITON_VERSION}"
        assert "assum" in record.note
        assert "spills" not in record.note
