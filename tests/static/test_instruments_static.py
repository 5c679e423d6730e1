"""The instruments that read compiled kernels tell good machine code from bad. No GPU is needed, nor torch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import triton
from triton.runtime.driver import driver as triton_driver

from codegen import sass_flow
from codegen.fake_driver import fake_driver, host_microseconds
from codegen.sass import TARGETS, Report, bytes_in_flight_per_sm, compile_kernel, occupancy
from tests.support import toys

pytestmark = pytest.mark.static

PHASES = ("prologue", "main_loop", "remainder", "epilogue", "finaliser")
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]


def compiled_copy(target: str = "sm_90", aligned: tuple[str, ...] = ("x", "y", "n")) -> Report:
    signature = {"x": "*fp16", "y": "*fp16", "n": "i32"}
    return compile_kernel(toys.copy, signature, {"BLOCK": 2048}, aligned=aligned, target=target)


def compiled_centre(block: int, **options: Any) -> Report:
    signature = {"x": "*fp32", "y": "*fp32"}
    constexprs = {"BLOCK": block}
    return compile_kernel(toys.centre_in_registers, signature, constexprs, aligned=("x", "y"), **options)


def compiled_sum(target: str = "sm_90", unroll: int = 4, stages: int = 1) -> Report:
    signature = {"x": "*fp16", "y": "*fp32", "rows": "i32"}
    constexprs = {"UNROLL": unroll, "BLOCK": 1024, "STAGES": stages}
    return compile_kernel(toys.sum_rows, signature, constexprs, aligned=("x", "y"), target=target)


def compiled_last_done(target: str = "sm_90") -> Report:
    signature = {"x": "*fp16", "partials": "*fp32", "counter": "*i32", "y": "*fp32", "rows": "i32"}
    constexprs = {"BLOCK": 1024, "BARRIER": True, "SEM": "acq_rel"}
    pointers = ("x", "partials", "counter", "y")
    return compile_kernel(toys.sum_last_done, signature, constexprs, aligned=pointers, target=target)


class TestAccesses:
    @pytest.mark.parametrize("target", TARGETS)
    def test_aligned_pointers_give_wide_accesses(self, target):
        report = compiled_copy(target)
        # 2048 elements of 2 bytes over 4 warps.
        each = 2048 * 2 // (4 * TARGETS[target].warp_size * 16)
        assert report.loads == report.stores == {16: each}
        assert report.spills == report.stack == report.shared == 0
        assert 0 < report.registers < 64

    @pytest.mark.parametrize("target", NVIDIA)
    def test_an_unaligned_pointer_gives_narrow_ones(self, target):
        report = compiled_copy(target, aligned=("y", "n"))
        assert set(report.loads) == {2}
        assert set(report.stores) == {16}

    @pytest.mark.parametrize("target", TARGETS)
    def test_a_stride_gives_narrow_loads(self, target):
        signature = {"x": "*fp16", "y": "*fp16", "n": "i32"}
        constexprs = {"STRIDE": 3, "BLOCK": 2048}
        report = compile_kernel(
            toys.copy_strided, signature, constexprs, aligned=("x", "y", "n"), target=target
        )
        assert set(report.loads) == {2}
        assert set(report.stores) == {16}

    # Registers a thread: 255 for NVIDIA, 512 for AMD.
    @pytest.mark.parametrize(("target", "floats"), [*((t, 512) for t in NVIDIA), ("gfx942", 1024)])
    def test_spills_are_seen(self, target, floats):
        threads = 4 * TARGETS[target].warp_size
        fitting = compiled_centre(32 * threads, target=target)
        spilling = compiled_centre(floats * threads, target=target)
        assert fitting.spills == fitting.stack == 0
        assert spilling.spills > 100
        assert spilling.stack > 100

    def test_options_are_passed_on(self):
        report = compiled_centre(8192, num_warps=8)
        assert report.num_warps == 8
        assert report.loads == {16: 8}
        assert compiled_centre(8192, num_warps=8, maxnreg=32).registers <= 32 < report.registers

    def test_none_is_a_constant(self):
        with_step = compile_kernel(toys.copy_or_zero, {"x": "*fp16", "y": "*fp16"}, {"BLOCK": 1024})
        without = compile_kernel(toys.copy_or_zero, {"x": None, "y": "*fp16"}, {"BLOCK": 1024})
        assert with_step.loads
        assert not without.loads
        assert without.stores

    @pytest.mark.parametrize(
        "signature", [{"x": "*fp16"}, {"x": "*fp16", "y": "*fp16", "n": "i32", "m": "i32"}]
    )
    def test_a_wrong_signature_is_refused(self, signature):
        with pytest.raises(ValueError, match="takes"):
            compile_kernel(toys.copy, signature, {"BLOCK": 64})


@pytest.mark.parametrize("target", NVIDIA)
class TestPhases:
    def test_phases_divide_the_text(self, target):
        report = compiled_last_done(target)
        counted = sum(getattr(report, f"{phase}_instructions") for phase in PHASES)
        blocks = sass_flow.parse(report.text)
        instructions = [ins for block in blocks for ins in block.instructions]
        padding = [ins for ins in blocks[-1].instructions if ins.name == "NOP"]
        assert counted == len(instructions) - len(padding) - 1  # a jump to itself behind the last EXIT

    def test_each_phase_holds_what_it_should(self, target):
        phases = sass_flow.phases(sass_flow.parse(compiled_last_done(target).text))
        names = {phase: {ins.name for ins in getattr(phases, phase)} for phase in PHASES}
        assert {"LDG", "BRA"} <= names["main_loop"]
        assert not {"STG", "BAR", "EXIT"} & names["main_loop"]
        assert "LDG" in names["remainder"]
        assert "STG" not in names["remainder"]
        assert {"STG", "BAR", "ATOMG"} <= names["epilogue"]
        assert "LDG" not in names["epilogue"]
        assert {"LDG", "STG", "EXIT"} <= names["finaliser"]
        assert "ATOMG" not in names["finaliser"]
        assert any(".STRONG" in ins.opcode for ins in phases.finaliser if ins.name == "LDG")

    def test_the_main_loop_is_measured(self, target):
        report = compiled_sum(target)
        assert report.main_loop_loads == {16: 4}
        assert report.loads_in_main_loop == 64
        assert report.bytes_in_flight == 64
        assert 40 < report.main_loop_instructions < 100  # 32 conversions or additions, and addresses
        assert report.finaliser_instructions == report.remainder_instructions == 0

    def test_asynchronous_copies_are_in_flight_for_all_but_one_stage(self, target):
        two, four = (compiled_sum(target, unroll=1, stages=stages) for stages in (2, 4))
        assert two.loads_in_main_loop == four.loads_in_main_loop == 16
        assert (two.bytes_in_flight, four.bytes_in_flight) == (16, 48)

    def test_without_a_loop_everything_is_prologue(self, target):
        report = compiled_copy(target)
        assert report.main_loop_instructions == report.epilogue_instructions == 0
        assert report.prologue_instructions > 10
        assert report.bytes_in_flight == 32

    def test_loops_in_the_epilogue_are_counted(self, target):
        signature = {"x": "*fp16", "y": "*fp32", "rows": "i32"}
        constexprs = {"BLOCK": 1024, "PARTS": 64}
        report = compile_kernel(toys.sum_parts, signature, constexprs, aligned=("x", "y"), target=target)
        assert report.epilogue_loops == 1
        assert report.main_loop_loads


class TestFlow:
    """On code written by hand, where the answer is known."""

    def test_loads_wait_for_their_first_use(self):
        text = """
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/ LDG.E.64 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/ FADD R20, R7, R7 ;
        /*0030*/ LDG.E.U16 R10, desc[UR4][R2.64+0x20] ;
        /*0040*/ LDG.E R11, desc[UR4][R8.64] ;
        /*0050*/ EXIT ;
        """
        (block,) = sass_flow.parse(text)
        widths = [ins.width for ins in block.instructions[:5]]
        assert widths == [16, 8, 4, 2, 4]
        assert sass_flow.bytes_in_flight(block.instructions) == 24
        assert sass_flow.bytes_in_flight(block.instructions[2:]) == 6

    def test_a_jump_out_of_line_and_back_is_no_loop(self):
        text = """
        /*0000*/ ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0010*/ @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/ EXIT ;
.L_x_1:
        /*0040*/ MOV R2, R3 ;
        /*0050*/ BRA `(.L_x_0) ;
        """
        phases = sass_flow.phases(sass_flow.parse(text))
        assert len(phases.prologue) == 6
        assert not phases.main_loop

    def test_subroutines_count_and_shuffles_of_diverged_warps_do_not(self):
        text = """
        /*0000*/ CALL.REL.NOINC `($divide) ;
        /*0010*/ BRA.DIV ~URZ, `(.L_x_1) ;
        /*0020*/ SHFL.BFLY PT, R4, R5, 0x1, 0x1f ;
        /*0030*/ EXIT ;
.L_x_1:
        /*0040*/ WARPSYNC.ALL ;
        /*0050*/ EXIT ;
$divide:
        /*0060*/ MUFU.RCP R4, R5 ;
        /*0070*/ RET.REL.NODEC R2 `(kernel) ;
        """
        phases = sass_flow.phases(sass_flow.parse(text))
        assert [ins.name for ins in phases.prologue] == ["CALL", "BRA", "SHFL", "EXIT", "MUFU", "RET"]

    def test_the_innermost_of_nested_loops_is_the_main_one(self):
        text = """
.L_x_0:
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/ LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0020*/ @P0 BRA `(.L_x_1) ;
        /*0030*/ BRA.U UP0, `(.L_x_0) ;
        /*0040*/ STG.E desc[UR4][R2.64], R8 ;
        /*0050*/ EXIT ;
        """
        phases = sass_flow.phases(sass_flow.parse(text))
        assert [ins.opcode for ins in phases.main_loop] == ["LDG.E.128", "BRA"]
        assert [ins.name for ins in phases.epilogue] == ["STG", "EXIT"]


class TestOccupancy:
    @pytest.mark.parametrize(
        ("registers", "warps", "shared", "target", "expected"),
        [
            (32, 4, 0, "sm_90", 16),  # 64 warps
            (56, 4, 0, "sm_90", 9),  # 9 warps a partition by registers
            (255, 4, 0, "sm_90", 2),
            (128, 32, 0, "sm_90", 0),  # one CTA would need twice the registers there are
            (32, 1, 0, "sm_90", 32),  # CTAs
            (32, 4, 100 * 1024, "sm_90", 2),
            (32, 4, 77_000, "sm_90", 2),  # not three: the system takes 1 KB a CTA
            (32, 4, 100 * 1024, "sm_80", 1),
        ],
    )
    def test_limits(self, registers, warps, shared, target, expected):
        assert occupancy(registers, warps, shared, target) == expected

    def test_bytes_in_flight_are_bounded_by_the_plan_and_by_the_sm(self):
        report = compiled_sum()
        resident = occupancy(report.registers, 4, report.shared)
        assert bytes_in_flight_per_sm(report, 2) == 2 * 4 * 32 * 64
        assert bytes_in_flight_per_sm(report, 0.5) == 0.5 * 4 * 32 * 64
        assert bytes_in_flight_per_sm(report, 1000) == resident * 4 * 32 * 64


class Pointer:
    """What Triton takes for a tensor."""

    dtype = "fp32"

    def data_ptr(self) -> int:
        return 1 << 20


class TestFakeDriver:
    x = y = Pointer()

    def test_launches_are_counted_and_compiled_for_the_target(self):
        with fake_driver(TARGETS["sm_80"]) as driver:
            kernel = toys.copy[(8,)](self.x, self.y, 1024, BLOCK=128)
            toys.copy[(8,)](self.x, self.y, 1024, BLOCK=128)
        assert driver.launches == 2
        assert list(inspect.signature(driver.launcher_cls.__call__).parameters)[:3] == [
            "self",
            "gridX",
            "gridY",
        ]
        assert kernel.metadata.target.arch == 80

    def test_the_real_driver_comes_back_and_nothing_is_left(self):
        before = triton_driver._active

        def launch_and_fail() -> None:
            with fake_driver():
                toys.copy[(8,)](self.x, self.y, 1024, BLOCK=128)
                assert toys.copy.device_caches
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            launch_and_fail()
        assert triton_driver._active is before
        assert not toys.copy.device_caches

    def test_a_later_driver_compiles_anew(self):
        with fake_driver(TARGETS["sm_80"]) as first:
            toys.copy[(8,)](self.x, self.y, 1024, BLOCK=128)
        with fake_driver(TARGETS["sm_90"]) as second:
            kernel = toys.copy[(8,)](self.x, self.y, 1024, BLOCK=128)
        assert second.launches == 1
        assert kernel.metadata.target.arch == 90
        assert second.get_current_device() < first.get_current_device() < 0

    def test_host_time_is_per_call_and_in_microseconds(self):
        calls = []
        microseconds = host_microseconds(lambda: calls.append(sum(range(10000))), calls=5, rounds=3)
        assert len(calls) == 20
        assert 10 < microseconds < 10_000


def test_compiling_needs_a_process_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiled_copy()
