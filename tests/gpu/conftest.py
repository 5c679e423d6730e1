"""Has all cores compile the kernels of the selected cases first: that is most of the time that these tests
take, and a process compiles one kernel at a time."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import prod

import pytest

from bnfast.checks.cases import Case
from tests.support import oracle

CHUNK = 4  # cases that a process takes at a time
WORTH_IT = 12  # cases; fewer are compiled sooner than the processes have started
LARGEST = 1 << 25  # elements; a dozen processes could not all hold more, in the fp64 that they are drawn in


@pytest.fixture(scope="session", autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    """Every case of the selected tests, but for the largest, runs once in some other process, which leaves
    its kernels in Triton's cache on disk. What goes wrong there goes wrong here again, in a test that says
    so."""
    calls = (item.callspec for item in request.session.items if hasattr(item, "callspec"))
    values = (value for call in calls for value in call.params.values())
    distinct = dict.fromkeys(value for value in values if isinstance(value, Case))
    cases = [case for case in distinct if prod(case.shape) <= LARGEST]
    workers = min(12, os.cpu_count() or 1, len(cases) // 4)  # each has a CUDA context: half a GB of the GPU
    if oracle.unfit() is not None or len(cases) < WORTH_IT or workers < 2:
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        list(pool.map(oracle.compile_for, [cases[i : i + CHUNK] for i in range(0, len(cases), CHUNK)]))
    except BrokenProcessPool as error:
        print(f"kernels are compiled one by one, for the processes to compile them died: {error}")
    finally:  # what has not begun is not waited for when somebody interrupts this
        pool.shutdown(wait=False, cancel_futures=True)
