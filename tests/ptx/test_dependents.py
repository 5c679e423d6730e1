"""Launches that may start before the launch before them has ended: what they must not do before they wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bnfast.ptx.execute import MADE, READ_ONLY, UPDATED, Execution, Fault
from bnfast.ptx.program import Program
from tests.support.ptx_kernels import LANES, kernel, launch

pytestmark = pytest.mark.usefixtures("executor")

SEEDS = range(1, 6)
OWN = "mad.wide.u32 %rd10, %r0, 4, %rd0;\nmad.wide.u32 %rd11, %r0, 4, %rd1;\n"  # of two arrays
LOAD, STORE = "ld.global.b32 %r1, [%rd10];", "st.global.b32 [%rd11], %r0;"
WAIT, SIGNAL = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"


def array(n: int = 2 * LANES) -> np.ndarray:
    return np.zeros(n, np.uint32)


def of_two_arrays(body: str) -> Program:
    """Two warps, of statements on one line or several."""
    return kernel((OWN + body).replace(";", ";\n"), 2, 2 * LANES)


def made(x: np.ndarray, y: np.ndarray, *before: Execution) -> Execution:
    """A launch that loads x and stores to y. before: those that may run beside it."""
    return launch(of_two_arrays(LOAD + SIGNAL + WAIT + STORE), x, y, after=before or None)


def run(body: str, x: np.ndarray, y: np.ndarray, after: Sequence[Execution] | None) -> None:
    program = of_two_arrays(body)
    for seed in SEEDS:
        launch(program, x, y, kinds=[READ_ONLY, UPDATED], seed=seed, after=after)


def found(body: str, message: str, x: np.ndarray, y: np.ndarray, after: Sequence[Execution]) -> None:
    program = of_two_arrays(body)
    for seed in SEEDS:
        with pytest.raises(Fault, match=message):
            launch(program, x, y, kinds=[READ_ONLY, UPDATED], seed=seed, after=after)


def test_a_load_of_what_the_launch_before_stores() -> None:
    x, y, z = array(), array(), array()
    before = made(x, y)
    assert not before.dependent
    found(LOAD + WAIT + STORE, r"line \d+: a load before the wait", y, z, [before])
    run(WAIT + LOAD + STORE, y, z, [before])
    run(LOAD + WAIT + STORE, x, z, [before])  # it only loads x


def test_the_line_is_that_of_the_access() -> None:
    x, y, z = array(), array(), array()
    program = of_two_arrays("\n\n" + LOAD + WAIT)
    of_load = program.code["to"][:, 0] == program.registers["%r1"]
    (line,) = program.code["line"][of_load]
    with pytest.raises(Fault, match=f"line {line}: a load"):
        launch(program, y, z, after=[made(x, y)])


@pytest.mark.parametrize("store", [STORE, "atom.global.gpu.acq_rel.add.u32 %r2, [%rd11], 1;"])
def test_no_store_goes_ahead(store: str) -> None:
    """Not even one to memory that the launch before has never had: it may get it from what that has freed."""
    x, y, z = array(), array(), array()
    found(store + WAIT, "a store before the wait", x, z, [made(x, y)])
    run(WAIT + store, x, z, [made(x, y)])


def test_a_program_that_does_not_wait() -> None:
    x, y, z = array(), array(), array()
    before = made(x, y)
    found(LOAD, "ends without having waited", x, z, [before])
    found("setp.lt.u32 %p1, %r0, 5;\n@%p1 " + WAIT, "ends without having waited", x, z, [before])
    found("setp.lt.u32 %p1, %r0, 5;\n@%p1 ret;\n" + WAIT, "ends without having waited", x, z, [before])
    run(LOAD + STORE, x, z, None)  # which starts when all have ended


def test_each_warp_waits_for_itself() -> None:
    x, y, z = array(), array(), array()
    one = f"setp.lt.u32 %p1, %r0, {LANES};\n@%p1 {WAIT}\nbar.sync 0;\n"
    found(one + LOAD + WAIT, "a load before the wait", y, z, [made(x, y)])


def test_all_launches_that_may_still_run_count() -> None:
    """Not only the last one, which may itself have started before the one before it had ended."""
    x, y, z, other = array(), array(), array(), array()
    first = made(x, y)
    second = made(x, z, first)
    assert second.dependent
    found(LOAD + WAIT, "a load before the wait", y, other, [first, second])
    run(LOAD + WAIT, x, other, [first, second])


def test_what_an_atomic_counts_in_is_stored_to() -> None:
    counters, z = array(), array()
    body = "mad.wide.u32 %rd10, %r0, 4, %rd0;\natom.global.gpu.acq_rel.add.u32 %r2, [%rd10], 1;"
    before = launch(kernel(body, 1, 2 * LANES), counters, kinds=[UPDATED])
    found(LOAD + WAIT, "a load before the wait", counters, z, [before])


def test_without_a_launch_before_nothing_is_changed() -> None:
    x, y = np.arange(2 * LANES, dtype=np.uint32), array()
    program = of_two_arrays(SIGNAL + LOAD + WAIT + "st.global.b32 [%rd11], %r1;" + SIGNAL)
    for after in (None, []):
        launch(program, x, y, kinds=[READ_ONLY, MADE], after=after)
        assert y.tolist() == x.tolist()
