"""Races between warps of one program and lanes of one warp, and programs that never end."""

from __future__ import annotations

import pytest

from bnfast.ptx.execute import UPDATED, Arguments, Fault, run
from tests.ptx.test_memory import zeros
from tests.support.ptx_kernels import LANES, kernel, launch

pytestmark = pytest.mark.usefixtures("executor")


class TestWarpsAndLanesOfAProgram:
    TWO = "setp.eq.u32 %p1, %r0, 0;\nsetp.eq.u32 %p2, %r0, 32;\n@%p1 st.global.b32 [%rd0], 7;\n"

    @pytest.mark.parametrize("barrier", ["bar.sync 0;\n", ""])
    @pytest.mark.parametrize(
        ("second", "what"),
        [("st.global.b32 [%rd0], 8;", "write-write"), ("ld.global.b32 %r1, [%rd0];", "race")],
    )
    def test_warps_without_a_barrier(self, second: str, what: str, barrier: str) -> None:
        program = kernel(f"{self.TWO}{barrier}@%p2 {second}", 1, 64)
        for seed in range(1, 6):
            if barrier:
                launch(program, zeros(1), seed=seed)
                continue
            with pytest.raises(Fault, match=f"{what}.* in global memory with another warp"):
                launch(program, zeros(1), seed=seed)
            launch(program, zeros(1), kinds=[UPDATED], seed=seed)  # by all, which one then updates

    def test_warps_that_store_the_same(self) -> None:
        """Triton has all warps store what one of them would have to."""
        for barrier, replicas in (("bar.sync 0;", 0), ("", 1)):
            found = launch(kernel(f"{self.TWO}{barrier}\n@%p2 st.global.b32 [%rd0], 7;", 1, 64), zeros(1))
            assert found.totals["replicas"] == replicas

    def test_lanes_that_read_what_others_have_stored(self) -> None:
        body = "mul.lo.u32 %r1, %r0, 4;\nst.shared.b32 [%r1], %r0;\n{}\nld.shared.b32 %r2, [0];"
        launch(kernel(body.format("bar.warp.sync -1;"), 1), zeros(1), shared=4 * LANES)
        with pytest.raises(Fault, match="write-read race in shared memory"):
            launch(kernel(body.format(""), 1), zeros(1), shared=4 * LANES)

    def test_lanes_that_store_different_values_at_one_address(self) -> None:
        launch(kernel("st.shared.b32 [0], 7;", 1), zeros(1), shared=4)
        with pytest.raises(Fault, match="write-write race in shared memory"):
            launch(kernel("st.shared.b32 [0], %r0;", 1), zeros(1), shared=4)

    def test_races_where_any_value_will_do(self) -> None:
        """Shuffles of what does not commute leave lanes with values that differ in their last bits."""
        program, arguments = kernel("st.shared.b32 [0], %r0;", 0), Arguments()
        run(program, "k", 1, 4, arguments, 1, racing=True)
        with pytest.raises(Fault, match="write-write race in shared memory"):
            run(program, "k", 1, 4, arguments, 1)

    def test_an_atomic_is_aligned(self) -> None:
        with pytest.raises(Fault, match="a misaligned atomic"):
            launch(kernel("atom.global.gpu.acq_rel.add.u32 %r1, [%rd0+2], 1;", 1), zeros(2), kinds=[UPDATED])

    @pytest.mark.parametrize("releases", [1, 63, 64, 65, 128])
    def test_a_store_after_many_releases_races(self, releases: int) -> None:
        """Program 0 stores behind them what program 1, which has acquired the first, loads."""
        count = "atom.global.gpu.acq_rel.add.u32 %r1, [%rd0], 1;\n"
        body = f"""
            setp.eq.u32 %p1, %ctaid.x, 0;
            setp.ne.u32 %p3, %r0, 0;
            @%p3 bra $end;
            @!%p1 bra $other;
            {count * releases}
            st.global.b32 [%rd1], 7;
            bra $end;
            $other: atom.global.gpu.acq_rel.add.u32 %r1, [%rd0], 1;
            ld.global.b32 %r2, [%rd1];
            $end:
        """
        for seed in range(1, 6):
            with pytest.raises(Fault, match="race in global memory with program"):
                launch(kernel(body, 2), zeros(1), zeros(1), kinds=[UPDATED, UPDATED], grid=2, seed=seed)

    def test_a_program_that_does_not_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(Fault, match="a program that does not end"):
            launch(kernel("$again: bra $again;", 1), zeros(1))
