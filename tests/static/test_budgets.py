"""The regression gate: bytes, launches, registers, bytes in flight and the width of loads held against
codegen/budgets.csv, and no spills. Host time is held in test_host_time.py."""

from __future__ import annotations

import itertools

import pytest

from bnfast import dispatch
from codegen import budgets, figures
from codegen.__main__ import counted
from codegen.budget_cases import ENTRIES, Entry

pytestmark = pytest.mark.static


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_no_figure_is_worse_than_its_budget(entry: Entry) -> None:
    budget = budgets.read()
    complaint = budgets.complaint(budgets.changes(counted(entry), budget))
    assert not complaint, complaint
    for each in itertools.chain(*figures.of_case(entry.case, entry.training).values()):
        assert each.spills == 0, each
    if dispatch.TRITON_VERSION not in budgets.versions(budget):
        pytest.skip(f"{budgets.PATH.name} has no registers of Triton {dispatch.TRITON_VERSION}")
