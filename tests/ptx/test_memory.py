"""What the executor refuses and counts in memory: small kernels that do it, beside others that do not."""

from __future__ import annotations

import numpy as np
import pytest

from bnfast.ptx.execute import MADE, READ_ONLY, UPDATED, Fault
from tests.support.ptx_kernels import LANES, kernel, launch

pytestmark = pytest.mark.usefixtures("executor")

ADDRESS = "mad.wide.u32 %rd10, %r0, 4, %rd0;\n"  # of the thread's own element of the first array
SEEDS = range(1, 6)


def zeros(n: int = LANES) -> np.ndarray:
    return np.zeros(n, np.uint32)


def always_found(body: str, message: str, *arrays: np.ndarray, threads: int = LANES, **how: object) -> None:
    for seed in SEEDS:
        with pytest.raises(Fault, match=message):
            launch(kernel(body, len(arrays), threads), *(a.copy() for a in arrays), seed=seed, **how)  # type: ignore[arg-type]


def never_found(body: str, *arrays: np.ndarray, threads: int = LANES, **how: object) -> None:
    for seed in SEEDS:
        launch(kernel(body, len(arrays), threads), *(a.copy() for a in arrays), seed=seed, **how)  # type: ignore[arg-type]


class TestGlobal:
    def test_out_of_bounds(self) -> None:
        store = ADDRESS + "st.global.b32 [%rd10+{}], %r0;"
        always_found(store.format(4), "out of bounds: lane 31", zeros())
        never_found(store.format(0), zeros())

    def test_misaligned(self) -> None:
        x = zeros(2 * LANES)
        body = ADDRESS + "ld.global.v2.b32 {%r1, %r2}, [%rd10];"
        always_found(body, "misaligned access of 8 bytes", x, kinds=[READ_ONLY])

    def test_what_is_loaded_may_be_dropped(self) -> None:
        x, y = np.arange(2 * LANES, dtype=np.uint32), zeros()
        body = """
            mad.wide.u32 %rd10, %r0, 8, %rd0;
            ld.global.v2.b32 {_, %r1}, [%rd10];
            mad.wide.u32 %rd11, %r0, 4, %rd1;
            st.global.b32 [%rd11], %r1;
        """
        x = x[-x.ctypes.data % 8 // 4 :][: 2 * LANES]
        launch(kernel(body, 2), x, y)
        assert y.tolist() == x[1::2].tolist()

    def test_a_masked_store_is_none(self) -> None:
        y = zeros()
        launch(kernel(ADDRESS + "setp.lt.u32 %p1, %r0, 5;\n@%p1 st.global.b32 [%rd10], 7;", 1), y)
        assert y.tolist() == [7] * 5 + [0] * 27

    def test_a_store_to_an_input(self) -> None:
        always_found(ADDRESS + "st.global.b32 [%rd10], 1;", "store to an input", zeros(), kinds=[READ_ONLY])

    def test_a_load_of_uninitialized_memory(self) -> None:
        body = ADDRESS + "ld.global.b32 %r1, [%rd10];\nst.global.b32 [%rd10], %r1;"
        always_found(body, "uninitialized memory", zeros(), kinds=[MADE])
        never_found(body, zeros(), kinds=[UPDATED])
        never_found(ADDRESS + "ld.global.b32 %r1, [%rd10];", zeros(), kinds=[MADE])  # an earlier launch's

    @pytest.mark.parametrize(("first", "second"), [("st", "st"), ("st", "ld"), ("ld", "st")])
    def test_a_race_of_programs(self, first: str, second: str) -> None:
        access = {"st": "st.global.b32 [%rd10], %r5;", "ld": "ld.global.b32 %r5, [%rd10];"}
        own = f"""
            mov.u32 %r5, %ctaid.x;
            setp.eq.u32 %p1, %r5, 0;
            @%p1 bra $first;
            {access[second]}
            ret;
            $first: {access[first]}
        """
        always_found(ADDRESS + own, "race|several programs", zeros(), kinds=[UPDATED], grid=2)

    def test_sectors(self) -> None:
        for stride, sectors in ((4, 4), (8, 8), (32, 32)):
            body = f"mad.wide.u32 %rd10, %r0, {stride}, %rd0;\nld.global.b32 %r1, [%rd10];"
            x = np.zeros(8 * LANES + 8, np.uint32)
            x = x[-x.ctypes.data % 32 // 4 :]  # sectors begin on 32 bytes
            found = launch(kernel(body, 1), x, kinds=[READ_ONLY])
            assert (found.count("sectors"), found.count("fewest_sectors")) == (sectors, 4)


# %r5: the sum of what is stored from %rd0 on, up to the element of this number.
ADD_UP = """
    mov.u32 %r5, 0;
    mov.u32 %r6, 0;
$again:
    mad.wide.u32 %rd12, %r6, 4, %rd0;
    ld.global.b32 %r7, [%rd12];
    add.s32 %r5, %r5, %r7;
    add.s32 %r6, %r6, 1;
    setp.le.u32 %p4, %r6, {last};
    @%p4 bra $again;
"""
# Each program stores its number and counts itself; the last adds up what all have stored.
COUNTED = """
    mov.u32 %r1, %ctaid.x;
    mad.wide.u32 %rd10, %r1, 4, %rd0;
    setp.eq.u32 %p1, %r0, {storing};
    @%p1 st.global.b32 [%rd10], %r1;
    {barrier}
    setp.eq.u32 %p2, %r0, 0;
    @%p2 atom.global.gpu.{order}.add.u32 %r2, [%rd1], 1;
    @%p2 st.shared.b32 [global_smem], %r2;
    {second}
    ld.shared.b32 %r3, [global_smem];
    mov.u32 %r4, %nctaid.x;
    sub.s32 %r4, %r4, 1;
    setp.ne.b32 %p3, %r3, %r4;
    @%p3 ret;
    @%p2 st.global.b32 [%rd1], 0;
    {add_up}
    @%p2 st.global.b32 [%rd2], %r5;
"""


class TestSynchronization:
    how = {"kinds": [MADE, UPDATED, MADE], "grid": 7, "shared": 4, "threads": 64}

    def body(self, **what: object) -> str:
        given = {"storing": 40, "barrier": "bar.sync 0;", "order": "acq_rel", "second": "bar.sync 0;"}
        return COUNTED.format(add_up=ADD_UP.format(last="%r4"), **{**given, **what})

    def test_the_last_program_sees_what_all_have_stored(self) -> None:
        for seed in SEEDS:
            partials, semaphore, total = zeros(7), zeros(1), zeros(1)
            how = {key: value for key, value in self.how.items() if key != "threads"}
            done = launch(
                kernel(self.body(), 3, 64), partials, semaphore, total, seed=seed, resident=3, **how
            )  # type: ignore[arg-type]
            assert (total[0], semaphore[0]) == (21, 0)
            assert done.totals["final_round_trips"] == 7  # of the loop

    def test_an_atomic_that_does_not_synchronize(self) -> None:
        always_found(self.body(order="relaxed"), "race", zeros(7), zeros(1), zeros(1), **self.how)

    def test_stores_of_another_warp_need_a_barrier_before_it(self) -> None:
        always_found(self.body(barrier=""), "race", zeros(7), zeros(1), zeros(1), **self.how)
        never_found(
            self.body(barrier="", storing=0), zeros(7), zeros(1), zeros(1), **self.how
        )  # the same warp's

    def test_other_warps_need_a_barrier_after_it(self) -> None:
        always_found(self.body(second=""), "race|uninitialized", zeros(7), zeros(1), zeros(1), **self.how)

    def test_what_a_program_knows_is_handed_on(self) -> None:
        """The last of a pair counts the pair; the last pair adds up what all programs have stored."""
        for seed in SEEDS:
            values, counters, total = zeros(8), zeros(5), zeros(1)
            how = {"kinds": [MADE, UPDATED, MADE], "grid": 8, "seed": seed, "resident": 5}
            acquires, relaxes = (
                kernel(PAIRS.format(add_up=ADD_UP.format(last=7), order=order), 3)
                for order in ("acq_rel", "relaxed")
            )
            launch(acquires, values, counters, total, **how)  # type: ignore[arg-type]
            assert (total[0], counters.any()) == (28, False)
            with pytest.raises(Fault, match="race in global memory"):
                launch(relaxes, zeros(8), zeros(5), zeros(1), **how)  # type: ignore[arg-type]

    def test_a_store_to_what_others_read(self) -> None:
        body = """
            ld.global.b32 %r1, [%rd0];
            mov.u32 %r2, %ctaid.x;
            setp.eq.u32 %p1, %r2, 0;
            add.s32 %r1, %r1, 1;
            @%p1 st.global.b32 [%rd0], %r1;
        """
        always_found(body, "race in global memory|several programs load", zeros(1), kinds=[UPDATED], grid=4)

    @pytest.mark.parametrize(("barrier", "order"), [(True, "acq_rel"), (False, "acq_rel"), (True, "relaxed")])
    def test_the_last_program_stores_what_all_have_read(self, barrier: bool, order: str) -> None:
        body = f"""
            ld.global.b32 %r1, [%rd0];
            {"bar.sync 0;" if barrier else ""}
            setp.ne.b32 %p0, %r0, 0;
            @%p0 ret;
            atom.global.gpu.{order}.add.u32 %r3, [%rd1], 1;
            setp.ne.b32 %p1, %r3, 3;
            @%p1 ret;
            add.s32 %r1, %r1, 1;
            st.global.b32 [%rd0], %r1;
        """
        found = never_found if barrier and order == "acq_rel" else always_found
        message = () if found is never_found else ("race in global memory|several programs load",)
        found(body, *message, zeros(1), zeros(1), kinds=[UPDATED] * 2, grid=4, threads=64)


# Eight programs, of one lane each that does anything
PAIRS = """
    setp.ne.b32 %p0, %r0, 0;
    @%p0 ret;
    mov.u32 %r1, %ctaid.x;
    mad.wide.u32 %rd10, %r1, 4, %rd0;
    st.global.b32 [%rd10], %r1;
    shr.u32 %r2, %r1, 1;
    mad.wide.u32 %rd11, %r2, 4, %rd1;
    atom.global.gpu.acq_rel.add.u32 %r3, [%rd11], 1;
    setp.ne.b32 %p1, %r3, 1;
    @%p1 ret;
    st.global.b32 [%rd11], 0;
    atom.global.gpu.{order}.add.u32 %r4, [%rd1+16], 1;
    setp.ne.b32 %p2, %r4, 3;
    @%p2 ret;
    st.global.b32 [%rd1+16], 0;
    {add_up}
    st.global.b32 [%rd2], %r5;
"""


class TestShared:
    swap = """
        mul.lo.u32 %r1, %r0, 4;
        st.shared.b32 [%r1], %r0;
        {barrier}
        sub.s32 %r2, 63, %r0;
        mul.lo.u32 %r2, %r2, 4;
        ld.shared.b32 %r3, [%r2];
        mad.wide.u32 %rd10, %r0, 4, %rd0;
        st.global.b32 [%rd10], %r3;
    """

    def test_warps_meet_at_a_barrier(self) -> None:
        y = zeros(64)
        launch(kernel(self.swap.format(barrier="bar.sync 0;"), 1, 64), y, shared=256)
        assert y.tolist() == [*range(63, -1, -1)]

    def test_a_race_of_warps(self) -> None:
        always_found(
            self.swap.format(barrier=""),
            "race in shared memory|uninitialized",
            zeros(64),
            threads=64,
            shared=256,
        )

    def test_a_load_of_uninitialized_memory(self) -> None:
        always_found("ld.shared.b32 %r1, [0];", "uninitialized shared memory", zeros(1), shared=4)

    def test_out_of_bounds(self) -> None:
        always_found("st.shared.b32 [256], %r0;", "out of bounds in shared memory", zeros(1), shared=256)

    @pytest.mark.parametrize(("stride", "waves"), [(4, 1), (8, 2), (128, 32), (0, 1), (132, 1)])
    def test_wavefronts(self, stride: int, waves: int) -> None:
        body = f"mul.lo.u32 %r1, %r0, {stride};\nst.shared.b32 [%r1], 7;"
        found = launch(kernel(body, 1), zeros(1), shared=132 * LANES)
        assert (found.count("wavefronts"), found.count("fewest_wavefronts")) == (waves, 1)

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("matrices", [1, 2, 4])
    def test_matrices(self, matrices: int, transposed: bool) -> None:
        """Row r of matrix j is stored 16 bytes after the row before it."""
        names = ", ".join(f"%r2{j}" for j in range(matrices))
        trans = ".trans" if transposed else ""
        stores = "\n".join(f"st.global.b32 [%rd11+{4 * j}], %r2{j};" for j in range(matrices))
        body = f"""
            mad.wide.u32 %rd10, %r0, 16, %rd0;
            ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd10];
            mul.lo.u32 %r1, %r0, 16;
            st.shared.v4.b32 [%r1], {{%r10, %r11, %r12, %r13}};
            bar.warp.sync -1;
            ldmatrix.sync.aligned.m8n8.x{matrices}{trans}.shared.b16 {{{names}}}, [%r1];
            mad.wide.u32 %rd11, %r0, {4 * matrices}, %rd1;
            {stores}
        """
        x = np.arange(8 * LANES, dtype=np.uint16).reshape(4, 8, 8)
        source = np.zeros(LANES * 4, np.uint32)
        source.view(np.uint16)[: x.size] = x.reshape(-1)
        to = np.zeros((LANES, matrices), np.uint32)
        launch(kernel(body, 2), source, to.reshape(-1), shared=16 * LANES)
        wanted = x.swapaxes(1, 2) if transposed else x
        assert (
            to.view(np.uint16).reshape(8, 4, matrices, 2).transpose(2, 0, 1, 3).reshape(matrices, 8, 8)
            == wanted[:matrices]
        ).all()


class TestWarps:
    def test_lanes_meet_again_before_a_shuffle(self) -> None:
        body = """
            setp.lt.u32 %p1, %r0, 9;
            @%p1 bra $few;
            mul.lo.u32 %r1, %r0, 10;
            bra $all;
        $few:
            mul.lo.u32 %r1, %r0, 100;
        $all:
            shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;
            mad.wide.u32 %rd10, %r0, 4, %rd0;
            st.global.b32 [%rd10], %r2;
        """
        y = zeros()
        found = launch(kernel(body, 1), y)
        assert y.tolist() == [k * (100 if k < 9 else 10) for k in (lane ^ 16 for lane in range(LANES))]
        assert found.count("diverged") == 1

    def test_a_shuffle_that_some_lanes_never_reach(self) -> None:
        body = "setp.lt.u32 %p1, %r0, 9;\n@%p1 shfl.sync.idx.b32 %r2, %r0, 1, 31, -1;"
        always_found(body, "a shuffle in a diverged warp", zeros())

    def test_a_barrier_that_a_warp_never_reaches(self) -> None:
        body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:"
        always_found(body, "have not reached", zeros(), threads=64)

    def test_round_trips(self) -> None:
        """Loads that do not wait for each other are one; a load at a loaded address is another."""
        chased = f"""{ADDRESS}
            ld.global.b32 %r1, [%rd10];
            ld.global.b32 %r2, [%rd10];
            add.s32 %r3, %r1, %r2;
            mad.wide.u32 %rd11, %r3, 4, %rd0;
            ld.global.b32 %r4, [%rd11];
            add.s32 %r5, %r4, 1;
        """
        found = launch(kernel(chased, 1), zeros(), kinds=[READ_ONLY])
        assert found.totals["round_trips"] == 2


def test_the_same_schedule_again_gives_the_same_counts() -> None:
    body = TestSynchronization().body()
    runs = [
        launch(
            kernel(body, 3, 64),
            zeros(7),
            zeros(1),
            zeros(1),
            kinds=[MADE, UPDATED, MADE],
            grid=7,
            shared=4,
            seed=3,
        )
        for _ in range(2)
    ]
    assert runs[0].instructions == runs[1].instructions
    assert all((runs[0].counters[name] == runs[1].counters[name]).all() for name in runs[0].counters)
