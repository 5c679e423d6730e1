"""Skips these tests where they cannot run, and has all cores compile their kernels first: that is most of the
time they take, and a process compiles one kernel at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import prod
from pathlib import Path

import pytest

from bnfast.checks.cases import Case
from tests.gpu import parity

HERE = Path(__file__).parent
WORTH_IT = 12  # cases; fewer are compiled sooner than the processes have started
LARGEST = 1 << 25  # elements; a dozen processes could not all hold more, in the fp64 that they are drawn in


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = parity.unfit()
    if reason is not None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def cases_of(items: Sequence[pytest.Item]) -> list[Case]:
    """The distinct cases among the parameters of the tests that were selected, but for the largest."""
    calls = (item.callspec for item in items if hasattr(item, "callspec"))
    values = (value for call in calls for value in call.params.values())
    cases = dict.fromkeys(value for value in values if isinstance(value, Case))
    return [case for case in cases if prod(case.shape) <= LARGEST]


@pytest.fixture(scope="session", autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    """Every case runs once in some other process, which leaves its kernels in Triton's cache on disk.

    What goes wrong there goes wrong here again, in a test that says so.
    """
    cases = cases_of(request.session.items)
    workers = min(12, os.cpu_count() or 1, len(cases) // 4)  # each has a CUDA context: half a GB of the GPU
    if parity.unfit() is not None or len(cases) < WORTH_IT or workers < 2:
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            list(pool.map(parity.compile_for, [cases[worker::workers] for worker in range(workers)]))
        except BrokenProcessPool as error:
            print(f"kernels are compiled one by one, for the processes to compile them died: {error}")
