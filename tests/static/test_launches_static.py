"""What is recorded of launches: it is the code that the other static tests compile by hand, it makes
predictions, and a worse plan shows in it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import host, predict, records
from bnfast import dispatch
from bnfast.kernels import plan
from codegen import budgets, launches, sass
from codegen.__main__ import counted
from codegen.budget_cases import Entry
from codegen.cases import Case
from tests.support import kernel_cases, row_cases
from tests.support.compiled import compiled
from tests.support.kernel_cases import After, Shape

pytestmark = pytest.mark.static

BF16 = torch.bfloat16
PLAIN = Case("BatchNorm", (256, 256, 56, 56), 0, BF16, True)
SIGNS = Case("BatchNorm", (256, 256, 56, 56), 0, BF16, True, "relu", True)
GROUPS = Case("GroupNorm", (16, 320, 64, 64), 32, torch.float32, True)
ROWS = Case("LayerNorm", (16384, 768), 0, torch.float32, False)


def by_hand(case: Case) -> dict[str, sass.Report]:
    """The kernels of a case, as the support code of the static tests has them compiled."""
    dtype = "bf16" if case.dtype == BF16 else "fp32"
    if case.norm == "LayerNorm":
        calls = [row_cases.call(kind, *case.shape, dtype) for kind in ("forward", "gradients", "column_sums")]
    else:
        shape = Shape(case.shape[0], case.shape[1], case.shape[2] * case.shape[3], True, case.groups)
        after = After("relu", "signs") if case.residual else After()
        calls = [kernel_cases.call(kind, shape, dtype, after=after) for kind in kernel_cases.KINDS]
    return {c.kernel.__name__: compiled(c) for c in calls if c is not None}


@pytest.mark.parametrize("case", [PLAIN, SIGNS, GROUPS, ROWS], ids=str)
def test_static_tests_look_at_what_is_launched(case: Case) -> None:
    expected, found = by_hand(case), [each for several in launches.of_case(case).values() for each in several]
    for each in found:
        if each.kernel in expected:
            assert sass.report(each.code) == expected.pop(each.kernel)
    assert not expected


def test_predictions() -> None:
    forward, backward = predict.records([SIGNS])
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


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plan of kernels that keep a quarter of the loads under way, and of twice the programs that reduce."""
    maps = plan.Program(
        plan.ELEMENTWISE.warps,
        plan.ELEMENTWISE.per_sm,
        plan.ELEMENTWISE.registers,
        plan.ELEMENTWISE.loads // 4,
    )
    reduce = plan.Program(8, 4, 128, 8)
    monkeypatch.setattr(plan, "MAPS", (maps, *plan.MAPS[1:]))
    monkeypatch.setattr(plan, "REDUCE", (reduce, *plan.REDUCE[1:]))
    caches = (plan.plan_elementwise, plan.plan_reduction)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("worse")
def test_a_worse_plan_is_noticed() -> None:
    entry = Entry(PLAIN)
    changes = budgets.changes(counted(entry), budgets.read())
    complaint = budgets.complaint(changes)
    version = f"(Triton {dispatch.TRITON_VERSION})"
    assert f"{entry}, forward, transform_kernel: KB in flight {version} was" in complaint
    assert f"{entry}, forward, statistics_kernel: bytes was" in complaint
    assert budgets.RENEW in complaint


def test_the_host_job_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four functions with and without gradient, ours and torch's."""
    monkeypatch.setattr(host, "ROUNDS", 2)
    monkeypatch.setattr(host, "CALLS", 2)
    options = argparse.Namespace(device="cpu", out=tmp_path)
    assert host.run(options, ["matplotlib"]) == 0
    (file,) = tmp_path.glob("*/host.csv")
    found = records.read(file)
    assert found["variant"].tolist() == ["bnfast", "torch"] * 8
    assert (found["host_us"] > 0).all()
