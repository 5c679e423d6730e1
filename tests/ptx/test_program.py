"""What is not known in all its parts is refused, and so is a launch that is handed what it cannot take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnfast.ptx import execute, program
from bnfast.ptx.execute import UPDATED, Arguments, run
from bnfast.ptx.program import UnknownInstruction
from tests.support.ptx_kernels import LANES, kernel, launch

REFUSED = (
    # instructions that the executor does not have
    "tanh.approx.f32 %f1, %f2;",
    "atom.global.gpu.acq_rel.max.u32 %r1, [%rd1], %r2;",
    "st.local.b32 [%rd1], %r1;",
    "shfl.sync.down.b32 %r1, %r2, 1, 31, -1;",
    "setp.lt.f16 %p1, %h1, %h2;",
    "ld.global.b32 %r1, [%rd1 + %rd2];",
    # registers
    "mov.u32 %r1, %laneid;",
    "mov.u32 %r1, %clusterid.x;",
    "cvt.s8.s32 %r1, %r2;",
    "mov.u32 %r1, %ntid.x;",
    "mov.u32 %tid.x, 1;",
    "mov.u32 %x1, 1;",
    "add.s32 5, %r1, %r2;",
    "add.s32 _, %r1, %r2;",
    "add.s32 %r1, _, %r2;",
    "mov.b32 %r1, 0f3F8;",
    # numbers of operands
    "add.s32 %r1, %r2;",
    "add.s32 %r1, %r2, %r3, %r4;",
    "fma.rn.f32 %r1, %r2, %r3;",
    "neg.s32 %r1, %r2, %r3;",
    "selp.b32 %r1, %r2, %r3;",
    "redux.sync.add.s32 %r1, %r2;",
    "atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], %r2, %r3;",
    "ret %r1;",
    "mov.b64 %rd1, {%rs1, %rs2, %rs3, %rs4};",
    "mov.b64 {%rs1, %rs2, %rs3, %rs4}, %rd1;",
    "mov.b128 %rq1, {%rd1, %rd2};",
    "mov.b128 {%rd1, %rd2}, %rq1;",
    "ld.global.v2.b32 {%r1, %r2, %r3, %r4}, [%rd1];",
    "ld.global.v4.b32 {%r1, %r2}, [%rd1];",
    "st.global.b32 [%rd1], {%r1, %r2};",
    "st.shared.v2.b32 [%r1], %r2;",
    "ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8, %r9}, [%rd1];",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2}, [%r3];",
    # predicates
    "setp.lt.and.s32 %p1, %r1, %r2, %p2;",
    "setp.lt.xor.s32 %p1, %r1, %r2, !%p2;",
    "setp.lt.s32 %p1|%p2, %r1, %r2;",
    "setp.lt.ftz.f32 %p1, %r1, %r2;",
    "setp.ltu.s32 %p1, %r1, %r2;",
    "setp.lo.f32 %p1, %r1, %r2;",
    "shfl.sync.bfly.b32 %r9|%p1, %r2, 1, 31, -1;",
    "shfl.sync.bfly.b32 %r9, %r2, 1, 15, -1;",
    "shfl.sync.idx.b32 %r9, %r2, 1, 31, 255;",
    # barriers
    "bar.sync 1;",
    "bar.sync 0, 64;",
    "barrier.sync 3;",
    "bar.warp.sync 255;",
    # memory
    "ld.global.bf16 %rs1, [%rd1];",
    "ld.global.s8 %r1, [%rd1];",
    "ld.global.s16 %r1, [%rd1];",
    "ld.shared.s32 %rd1, [%r1];",
    "ld.global.b128 %rd1, [%rd2];",
    "ld.volatile.global.b32 %r1, [%rd1];",
    "ld.acquire.gpu.global.b32 %r1, [%rd1];",
    "ld.global.acquire.b32 %r1, [%rd1];",
    "st.shared::cluster.b32 [%r1], %r2;",
    "ld.param.b32 %r1, [k_param_0+4];",
    "@%p1 ld.param.b32 %r1, [k_param_0];",
    "ld.param.b8 %rs1, [k_param_0];",
    "ld.param.v2.b32 {%r1, %r2}, [k_param_0];",
    "st.global.b32 [%rd1], _;",
    # where it goes on
    "bra $nowhere;",
    "@%p1 bra.uni $nowhere;",
    "call (%r1), f, (%r2);",
)


@pytest.mark.parametrize("statement", REFUSED)
def test_what_is_not_known_is_refused_by_line_and_statement(statement: str) -> None:
    with pytest.raises(UnknownInstruction) as refused:
        kernel(f"mov.u32 %r7, 0;\n{statement}", 0)
    assert f"line 7: {statement[:-1]}" in str(refused.value)


@pytest.mark.parametrize("body", ["@%p1 ret;\n// ", "bra $end;\nret;\n$end: // "])
def test_a_kernel_goes_nowhere_after_its_end(body: str) -> None:
    text = f".visible .entry k()\n.reqntid 32\n{{\n{body}\n}}\n"
    with pytest.raises(UnknownInstruction, match="line 4: .*(ends with|no instruction has this label)"):
        program.Program(text)


def test_a_kernel_without_its_number_of_threads() -> None:
    with pytest.raises(UnknownInstruction, match="reqntid"):
        program.Program(".visible .entry k()\n{\nret;\n}\n")


@pytest.mark.parametrize("threads", ["48", "32, 2"])
def test_threads_that_are_not_whole_warps_in_a_row(threads: str) -> None:
    with pytest.raises(UnknownInstruction, match="whole warps"):
        program.Program(f".visible .entry k()\n.reqntid {threads}\n{{\nret;\n}}\n")


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize(("kind", "high"), [("s32", 2**32 - 1), ("u32", 0)])
def test_a_parameter_is_widened_with_its_sign(kind: str, high: int) -> None:
    body = f"""
        ld.param.{kind} %rd1, [k_param_1];
        mad.wide.u32 %rd2, %r0, 8, %rd0;
        st.global.b64 [%rd2], %rd1;
    """
    y = np.zeros(LANES, np.uint64)
    arguments = Arguments([y.ctypes.data])
    arguments.watch("y", y.ctypes.data, y.nbytes, 8, UPDATED)
    arguments.add("n", "i32", -5)
    run(kernel(body, 1), "k", 1, 0, arguments, 1)
    assert y.tolist() == [(high << 32) + 2**32 - 5] * LANES


@pytest.mark.usefixtures("executor")
def test_a_grid_has_three_dimensions() -> None:
    """Programs are numbered along the first one; some of them can be chosen."""
    numbers = "\n".join(
        f"mov.u32 %r{k}, %{name};" for k, name in enumerate(
            ("ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y", "nctaid.z"), start=1
        )
    )  # fmt: skip
    body = f"""{numbers}
        mad.lo.u32 %r7, %r3, %r5, %r2;
        mad.lo.u32 %r7, %r7, %r4, %r1;
        mad.wide.u32 %rd1, %r7, 16, %rd0;
        st.global.v4.b32 [%rd1], {{%r1, %r2, %r3, %r6}};
    """
    found = np.full((4, 3, 2, 4), 9, np.uint32)
    arguments = Arguments([found.ctypes.data])
    arguments.watch("found", found.ctypes.data, found.nbytes, 4, UPDATED)
    run(kernel(body, 1), "k", (2, 3, 4), 0, arguments, 1, only=range(1, 24))
    wanted = [[x, y, z, 4] for z in range(4) for y in range(3) for x in range(2)]
    assert found.reshape(24, 4).tolist() == [[9, 9, 9, 9], *wanted[1:]]


@pytest.mark.usefixtures("executor")
def test_a_parameter_that_nothing_was_handed_for() -> None:
    with pytest.raises(UnknownInstruction, match=r"line 6: ld.param.b32 .*: k is handed 1 parameters"):
        launch(kernel("ld.param.b32 %r1, [k_param_1];", 1), np.zeros(1))


@pytest.mark.parametrize(("kind", "bits"), [("fp32", 0x3FC00000), ("fp64", 0x3FF8 << 48), ("i32", 1)])
def test_a_scalar_is_handed_as_its_type(kind: str, bits: int) -> None:
    arguments = Arguments()
    arguments.add("factor", kind, 1.5)
    assert arguments.parameters == [bits]


@pytest.mark.parametrize("kind", ["fp16", "bf16", "*fp32", "tensordesc<fp32[8, 8]>"])
def test_a_scalar_of_another_type(kind: str) -> None:
    with pytest.raises(TypeError, match="factor is a scalar of type"):
        Arguments().add("factor", kind, 1.5)


def test_a_tensor_of_another_device() -> None:
    with pytest.raises(TypeError, match="x_ptr is on meta"):
        Arguments().add("x_ptr", "*fp32", torch.empty(8, device="meta"))


@pytest.mark.parametrize("other", ["dy_ptr", "y_ptr"])
def test_only_inputs_may_overlap(other: str) -> None:
    x, arguments = torch.zeros(12), Arguments()
    for name, window in (("x_ptr", x[:8]), ("residual_ptr", x[4:]), ("weight_ptr", x[4:])):
        arguments.add(name, "*fp32", window)
    assert arguments.tensors == {"x_ptr": 0, "residual_ptr": 1, "weight_ptr": 1}
    if other == "dy_ptr":
        arguments.add(other, "*fp32", x[2:6])
    else:
        with pytest.raises(ValueError, match="the tensor of y_ptr overlaps"):
            arguments.add(other, "*fp32", x[2:6])


@pytest.mark.parametrize(("strides", "size"), [((4, 1), 48), ((1, 3), 48), ((6, 1), 64), ((0, 1), 16)])
def test_a_tensor_reaches_to_its_last_element(strides: tuple[int, int], size: int) -> None:
    """Inductor pads strides."""
    arguments = Arguments()
    arguments.add("x_ptr", "*fp32", torch.empty(100).as_strided((3, 4), strides))
    assert [watched[1] for watched in arguments.watched] == [size]


@pytest.mark.usefixtures("executor")
def test_loads_of_inputs_that_overlap() -> None:
    x, y = np.arange(LANES + 8, dtype=np.uint32), np.zeros(LANES, np.uint32)
    body = """
        mad.wide.u32 %rd10, %r0, 4, %rd0;
        mad.wide.u32 %rd11, %r0, 4, %rd1;
        mad.wide.u32 %rd12, %r0, 4, %rd2;
        ld.global.b32 %r1, [%rd10];
        ld.global.b32 %r2, [%rd11];
        add.s32 %r1, %r1, %r2;
        st.global.b32 [%rd12], %r1;
    """
    launch(kernel(body, 3), x[:LANES], x[8:], y)
    assert (y == x[:LANES] + x[8:]).all()


def test_an_execution_needs_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="seeds"), execute.executing(seeds=()):
        pass
    monkeypatch.setattr(execute, "INTERPRET", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), execute.executing():
        pass
