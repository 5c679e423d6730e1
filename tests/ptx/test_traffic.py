"""What the executor counts of each tensor: small kernels that move it in different ways."""

from __future__ import annotations

import numpy as np
import pytest

from bnfast.ptx.execute import MADE, READ_ONLY, UNWATCHED, UPDATED, Arguments, Fault, run
from bnfast.ptx.traffic import Traffic
from tests.support.ptx_kernels import LANES, kernel, launch

pytestmark = pytest.mark.usefixtures("executor")

OWN = "mad.wide.u32 %rd10, %r0, 4, %rd0;\n"  # the address of the thread's own element
LOAD = "ld.global.b32 %r1, [%rd10];\n"
WAYS = {
    "once": (OWN + LOAD, 1),
    "by two instructions": (OWN + LOAD + LOAD, 2),
    "in three iterations": (f"""{OWN}
        mov.u32 %r2, 0;
        $again: {LOAD}
        add.s32 %r2, %r2, 1;
        setp.lt.u32 %p1, %r2, 3;
        @%p1 bra $again;
    """, 3),
    "by two lanes each": (
        f"shr.u32 %r3, %r0, 1;\nmad.wide.u32 %rd10, %r3, 4, %rd0;\n{LOAD}", 0.5
    ),
    "masked": (f"setp.lt.u32 %p1, %r0, 8;\n{OWN}@%p1 {LOAD}", 0.25),
}  # fmt: skip


def aligned(n: int) -> np.ndarray:
    x = np.zeros(n + 8, np.uint32)
    return x[-x.ctypes.data % 32 // 4 :][:n]  # sectors begin on 32 bytes


@pytest.mark.parametrize("way", WAYS)
def test_loads(way: str) -> None:
    body, times = WAYS[way]
    for seed in range(1, 6):
        found = launch(kernel(body, 1), aligned(LANES), kinds=[READ_ONLY], seed=seed).tensors["array0"]
        assert (found.reads, found.writes, found.unique_written) == (times, 0, 0)
        assert found.unique_read == 4 * LANES * min(times, 1)
    # another program's count too
    found = launch(kernel(body, 1), aligned(LANES), kinds=[READ_ONLY], grid=3).tensors["array0"]
    assert found.reads == 3 * times


def test_warps_that_move_the_same_count_once() -> None:
    """In any order, whether another warp has gone on or not. Triton has them do so."""
    body = f"and.b32 %r4, %r0, 31;\nmad.wide.u32 %rd10, %r4, 4, %rd0;\n{LOAD}add.s32 %r1, %r1, 1;\n"
    body += "st.global.b32 [%rd10], 7;"
    for seed in range(1, 6):
        found = launch(kernel(body, 1, 4 * LANES), aligned(LANES), kinds=[UPDATED], seed=seed)
        t = found.tensors["array0"]
        assert (t.reads, t.writes, t.unique_read, t.unique_written) == (1, 1, 128, 128)
        assert t.read_efficiency == t.write_efficiency == 1


def test_a_store_that_is_repeated() -> None:
    store = "st.global.b32 [%rd10], 7;\n"
    for times in (1, 2):
        t = launch(kernel(OWN + store * times, 1), aligned(LANES)).tensors["array0"]
        assert (t.writes, t.unique_written, t.reads) == (times, t.size, 0)


def test_stores_of_lanes_that_differ() -> None:
    for value, fails in (("7", False), ("%r0", True)):
        program = kernel(f"st.global.b32 [%rd0], {value};", 1, 2 * LANES)
        if fails:
            with pytest.raises(Fault, match="different values"):
                launch(program, aligned(1))
        else:
            assert launch(program, aligned(1)).tensors["array0"].writes == 1


@pytest.mark.parametrize(("line", "sectors"), [("", 4), (".loc 1 2 3\n", 4), (".loc 1 9 9\n", 8)], ids=str)
def test_a_sector_counts_once_for_a_line_of_the_source(line: str, sectors: int) -> None:
    """Two loads of 2 bytes each: one line's fetch a sector together, two lines' each."""
    half = "ld.global.b16 %rs1, [%rd10+{}];\n"
    body = f"{OWN}.loc 1 2 3\n{half.format(0)}{line}{half.format(2)}"
    t = launch(kernel(body, 1), aligned(LANES), kinds=[READ_ONLY]).tensors["array0"]
    assert (t.loaded_sectors, t.stored_sectors, t.loaded) == (sectors, 0, 128)
    assert t.read_efficiency == 4 / sectors


def fetched(loads: str, cached: tuple[int, int], programs: int = 1) -> int:
    """Sectors asked of L2 by programs that each make these loads."""
    x = aligned(4 * LANES)
    arguments = Arguments([x.ctypes.data])
    arguments.watch("x", x.ctypes.data, x.nbytes, 4, UNWATCHED)
    done = run(kernel(OWN + loads, 1), "k", programs, 0, arguments, 1, cached=cached)
    assert done.tensors["x"].moved[4:].tolist() == [4, 0]  # new ones, of all programs
    return done.count("fetched")


def test_what_l1_has_is_not_fetched_again() -> None:
    assert fetched(LOAD, (512, 0)) == fetched(LOAD + LOAD, (512, 0)) == 4
    assert fetched(LOAD + LOAD, (1, 0)) == 8  # no more than one sector is kept
    assert fetched(LOAD, (512, 0), programs=3) == 12  # each program has an L1
    assert fetched(LOAD, (512, 1), programs=3) == 4  # one SM's
    assert fetched(LOAD, (512, 2), programs=3) == 8  # the first and the third share one


def test_stores_are_always_fetched_and_new_once() -> None:
    done = launch(kernel(OWN + "st.global.b32 [%rd10], 7;\n" * 2, 1), aligned(LANES))
    assert done.count("fetched") == 8
    assert done.tensors["array0"].moved[4:].tolist() == [0, 4]


def test_two_names_of_one_tensor_are_one_and_overlaps_are_refused() -> None:
    x = aligned(LANES)
    arguments = Arguments([x.ctypes.data] * 2)
    assert arguments.watch("x", x.ctypes.data, x.nbytes, 4, UPDATED)
    assert not arguments.watch("y", x.ctypes.data, x.nbytes, 4, MADE)
    body = f"{OWN}{LOAD}mad.wide.u32 %rd11, %r0, 4, %rd1;\nst.global.b32 [%rd11], %r1;"
    t = run(kernel(body, 2), "k", 1, 0, arguments, 1).tensors
    assert t["x"] is t["y"]
    assert (t["x"].reads, t["x"].writes) == (1, 1)
    for shift, size in ((4, x.nbytes), (0, 4), (0, 2 * x.nbytes), (-4, 8)):
        with pytest.raises(ValueError, match="z overlaps"):
            arguments.watch("z", x.ctypes.data + shift, size, 4, MADE)


def test_launches_add_up() -> None:
    body = f"setp.lt.u32 %p1, %r0, %r9;\n{OWN}@%p1 {LOAD}"
    x, parts = aligned(LANES), []
    for few in (8, 16):
        parts.append(
            launch(kernel(f"mov.u32 %r9, {few};\n{body}", 1), x, kinds=[READ_ONLY]).tensors["array0"]
        )
    both: Traffic = parts[0] + parts[1]
    assert (both.reads, both.unique_read, both.size) == (0.75, 64, 128)
    assert both.loaded_sectors == 3


def test_several_schedules_are_not_added_up() -> None:
    runs = [launch(kernel(OWN + LOAD, 1), aligned(LANES), kinds=[READ_ONLY], seed=s) for s in (1, 2)]
    assert [run.tensors["array0"].reads for run in runs] == [1, 1]
