"""The instruments that read compiled kernels tell good machine code from bad. No GPU is needed."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.timing import host_microseconds
from bnfast.ptx.driver import TARGETS
from codegen.sass import Report, bytes_in_flight_per_sm, compile_kernel, occupancy
from codegen.sass_flow import Code, bytes_in_flight
from tests.support import toys

pytestmark = pytest.mark.static

NVIDIA = pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
EVERY = pytest.mark.parametrize("target", TARGETS)
HALVES, FLOATS, COUNTER = (
    torch.empty(64, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.int32)
)
ROWS = 48  # a multiple of 16, as kernels are specialised on


def compiled_copy(target: str = "sm_90", x: torch.Tensor = HALVES, stride: int = 1) -> Report:
    return compile_kernel(toys.copy, x, HALVES, 1024, BLOCK=2048, STRIDE=stride, target=target)


def compiled_sum(target: str = "sm_90", **options: int) -> Report:
    return compile_kernel(toys.sum_rows, HALVES, FLOATS, ROWS, BLOCK=1024, target=target, **options)


class TestAccesses:
    @EVERY
    def test_aligned_pointers_give_wide_accesses(self, target):
        report = compiled_copy(target)
        assert report.target == target
        # 2048 elements of 2 bytes over 4 warps
        each = 2048 * 2 // (4 * TARGETS[target].warp_size * 16)
        assert report.loads == report.stores == {16: each}
        assert report.spills == report.shared == 0
        assert 0 < report.registers < 64

    @EVERY
    @pytest.mark.parametrize("fault", [{"x": HALVES[1:]}, {"stride": 3}], ids=["unaligned", "stride"])
    def test_other_addresses_give_narrow_loads(self, target, fault):
        report = compiled_copy(target, **fault)
        assert set(report.loads) == {2}
        assert set(report.stores) == {16}

    @EVERY
    def test_spills_are_seen(self, target):
        for floats in (32, 1024 if target == "gfx942" else 512):  # a thread has 512 registers, or 255
            block = floats * 4 * TARGETS[target].warp_size
            report = compile_kernel(toys.centre_in_registers, FLOATS, FLOATS, BLOCK=block, target=target)
            assert report.spills == report.spilling + report.stack
            assert (report.spilling > 100, report.stack > 100) == (floats > 32, floats > 32)
            assert floats > 32 or report.spills == 0


@NVIDIA
class TestPhases:
    def test_each_phase_holds_what_it_should(self, target):
        options = {"BLOCK": 1024, "BARRIER": True, "SEM": "acq_rel"}
        pointers = (HALVES, FLOATS, COUNTER, FLOATS)
        code = compile_kernel(toys.sum_last_done, *pointers, ROWS, **options, target=target).code
        phases = code.phases
        names = {name: {ins.name for ins in getattr(phases, name)} for name in phases._fields[:-1]}
        assert {"LDG", "BRA"} <= names["main_loop"]
        assert not {"STG", "BAR", "EXIT"} & names["main_loop"]
        assert "LDG" in names["remainder"]
        assert "STG" not in names["remainder"]
        assert {"STG", "BAR", "ATOMG"} <= names["epilogue"]
        assert "LDG" not in names["epilogue"]
        assert {"LDG", "STG", "EXIT"} <= names["finalizer"]
        assert "ATOMG" not in names["finalizer"]
        assert any(".STRONG" in ins.opcode for ins in phases.finalizer if ins.name == "LDG")
        # together they are the text, but for padding and a jump to itself behind the last EXIT
        padding = len([*itertools.takewhile(lambda ins: ins.name == "NOP", reversed(code.instructions))])
        assert sum(map(len, phases[:-1])) == len(code.instructions) - padding - 1

    def test_the_main_loop_is_measured(self, target):
        report = compiled_sum(target, UNROLL=4)
        assert report.streamed == {16: 4}
        assert report.code.bytes_in_flight == 64
        phases = report.code.phases
        assert 40 < len(phases.main_loop) < 100  # 32 conversions or additions, and addresses
        assert not phases.finalizer
        assert not phases.remainder

    def test_without_a_loop_everything_is_prologue(self, target):
        report = compiled_copy(target)
        assert not report.code.phases.main_loop
        assert not report.code.phases.epilogue
        assert len(report.code.phases.prologue) > 10
        assert report.code.bytes_in_flight == 32
        assert report.streamed == report.loads

    def test_loops_in_the_epilogue_are_told_apart(self, target):
        phases = compiled_sum(target, PARTS=64).code.phases
        assert 0 < len(phases.repeated) < len(phases.epilogue)
        assert any(ins.loads for ins in phases.main_loop)


# Code written by hand, where the answer is known: text, and the opcodes of prologue, main loop and epilogue
FLOWS = {
    "a jump out of line and back is no loop": (
        """
        /*0000*/ ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0010*/ @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/ EXIT ;
.L_x_1:
        /*0040*/ MOV R2, R3 ;
        /*0050*/ BRA `(.L_x_0) ;
        """,
        "ISETP.GE.AND BRA LDG.E.128 EXIT MOV BRA", "", "",
    ),
    "subroutines count, and shuffles of diverged warps do not": (
        """
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
        """,
        "CALL.REL.NOINC BRA.DIV SHFL.BFLY EXIT MUFU.RCP RET.REL.NODEC", "", "",
    ),
    "the innermost of nested loops is the main one": (
        """
.L_x_0:
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/ LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0020*/ @P0 BRA `(.L_x_1) ;
        /*0030*/ BRA.U UP0, `(.L_x_0) ;
        /*0040*/ STG.E desc[UR4][R2.64], R8 ;
        /*0050*/ EXIT ;
        """,
        "", "LDG.E.128 BRA", "STG.E EXIT",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "prologue", "main_loop", "epilogue"), FLOWS.values(), ids=FLOWS)
def test_control_flow(text, prologue, main_loop, epilogue):
    phases = Code(text).phases
    found = (phases.prologue, phases.main_loop, phases.epilogue)
    assert [" ".join(ins.opcode for ins in phase) for phase in found] == [prologue, main_loop, epilogue]


def test_loads_wait_for_their_first_use():
    text = """
    /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
    /*0010*/ LDG.E.64 R8, desc[UR4][R2.64+0x10] ;
    /*0020*/ FADD R20, R7, R7 ;
    /*0030*/ LDG.E.U16 R10, desc[UR4][R2.64+0x20] ;
    /*0040*/ LDG.E R11, desc[UR4][R8.64] ;
    /*0050*/ EXIT ;
    """
    instructions = Code(text).instructions
    assert [ins.width for ins in instructions[:5]] == [16, 8, 4, 2, 4]
    assert bytes_in_flight(instructions) == 24
    assert bytes_in_flight(instructions[2:]) == 6


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
def test_occupancy(registers, warps, shared, target, expected):
    assert occupancy(registers, warps, shared, target) == expected


def test_bytes_in_flight_are_bounded_by_the_plan_and_by_the_sm():
    report = compiled_sum(UNROLL=4)
    resident = occupancy(report.registers, 4, report.shared)
    for planned in (0.5, 2, 1000):
        assert bytes_in_flight_per_sm(report, planned) == min(planned, resident) * 4 * 32 * 64


def test_host_time_is_per_call_and_in_microseconds():
    calls = []
    microseconds = host_microseconds(lambda: calls.append(sum(range(10000))), calls=5)
    assert len(calls) == 10
    assert 10 < microseconds < 10_000
