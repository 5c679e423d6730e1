"""Kernels compiled with no GPU at hand, and what the machine code says about their speed.

The disassembler comes with Triton. Kernels must have been imported without TRITON_INTERPRET."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.cache import get_cache_manager

from bnfast.kernels.launch import FP_FUSION
from codegen import sass_flow
from codegen.sass_flow import Instruction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}  # bytes
ITERATIONS = 8  # of the main loop, to see its steady state: more than stages of any pipeline

# A launch has an empty entry for each argument that it has looked at in vain: pointers, and constants of this
# type. With the same entries here, Triton's cache takes both for the same code, which is compiled once.
LOOKED_AT = str if triton.__version__.startswith("3.6.") else object

AMD_ACCESS = re.compile(r"\b(?:global|buffer)_(load|store)_[us]?(dwordx[234]|dword|short|byte)")
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


@dataclass(frozen=True)
class Report:
    """A compiled kernel in numbers. Counts are of instructions in the text, unless they say otherwise."""

    target: str
    num_warps: int
    registers: int  # a thread
    spills: int  # instructions that move registers to or from local memory; for AMD, vector registers spilled
    stack: int  # bytes a thread
    shared: int  # bytes a CTA
    loads: dict[int, int]  # from global memory: bytes a thread -> how many
    stores: dict[int, int]
    # None for AMD, where no control flow is read.
    bytes_in_flight: int | None = None  # the most bytes a thread waits for at a time, in the main loop if any
    prologue_instructions: int | None = None
    main_loop_instructions: int | None = None
    remainder_instructions: int | None = None
    epilogue_instructions: int | None = None
    finaliser_instructions: int | None = None
    epilogue_loops: int | None = None  # if any, the epilogue runs longer than it reads
    repeated_instructions: int | None = None  # the part of the epilogue inside its loops
    main_loop_loads: dict[int, int] | None = None
    text: str = field(default="", repr=False)

    @property
    def loads_in_main_loop(self) -> int | None:
        """Bytes a thread loads in one iteration, of the loop as unrolled."""
        return None if self.main_loop_loads is None else sum(w * n for w, n in self.main_loop_loads.items())


def compile_kernel(
    kernel: triton.JITFunction,
    signature: Mapping[str, str | None],
    constexprs: Mapping[str, Any] | None = None,
    *,
    aligned: Collection[str] = (),
    target: str = "sm_90",
    num_warps: int = 4,
    **options: Any,
) -> Report:
    """Compile for one of TARGETS and report.

    signature: the type of each argument ("*fp16", "i32", "fp32"), or None for one that is passed None.
    constexprs: the values of all other arguments.
    aligned: arguments known to be divisible by 16, as Triton specialises pointers and sizes.
    options: more of what a launch takes: num_stages, maxnreg.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("interpreted kernels cannot be compiled: import them without TRITON_INTERPRET")
    types = {name: "constexpr" if kind is None else kind for name, kind in signature.items()}
    values = dict(constexprs or {}) | {name: None for name, kind in signature.items() if kind is None}
    position = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    if sorted([*signature, *(constexprs or {})]) != sorted(position):
        raise ValueError(f"{kernel.__name__} takes {kernel.arg_names}")
    kinds = {name: types.get(name, "constexpr") for name in position}
    known: dict[str, list[list[Any]]] = {
        name: []
        for name, kind in kinds.items()
        if kind[0] == "*" or (name in values and isinstance(values[name], LOOKED_AT))
    }
    known |= {name: [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(
        kernel,
        kinds,
        {position[name]: value for name, value in values.items()},
        {position[name]: attributes for name, attributes in known.items()},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": FP_FUSION} | options  # as in a launch
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return report(compiled, target)


_reports: dict[str, Report] = {}


def report(compiled: CompiledKernel, target: str = "sm_90") -> Report:
    """What a kernel, compiled for one of TARGETS, came to. Reading the same code again costs nothing."""
    if compiled.hash not in _reports:
        read = _report_amd if target.startswith("gfx") else _report_nvidia
        _reports[compiled.hash] = read(compiled, target)
    return _reports[compiled.hash]


def occupancy(registers: int, warps: int, shared: int, target: str = "sm_90") -> int:
    """CTAs that fit on one SM, given registers a thread, warps a CTA and bytes of shared memory a CTA."""
    # Each of an SM's four partitions has 16384 registers, handed to warps in units of 256, and 16 warps.
    warps_a_partition = min(16384 // (-(-registers * 32 // 256) * 256), 16)
    by_shared = SHARED_PER_SM[target] // (shared + 1024)  # the system keeps 1 KB a CTA
    return min(4 * warps_a_partition // warps, by_shared, 32)


def bytes_in_flight_per_sm(report: Report, planned_ctas_per_sm: float) -> float:
    """Bytes one SM waits for at a time, when the grid has so many CTAs for it and as many of them fit."""
    if report.bytes_in_flight is None:
        raise ValueError(f"bytes in flight are read of NVIDIA's machine code, not of {report.target}'s")
    resident = occupancy(report.registers, report.num_warps, report.shared, report.target)
    return min(resident, planned_ctas_per_sm) * report.num_warps * 32 * report.bytes_in_flight


def _report_nvidia(compiled: CompiledKernel, target: str) -> Report:
    text, usage = _disassembled(compiled)
    blocks = sass_flow.parse(text)
    phases = sass_flow.phases(blocks)
    instructions = [ins for block in blocks for ins in block.instructions]
    steady = phases.main_loop * ITERATIONS or phases.prologue
    return Report(
        target=target,
        num_warps=compiled.metadata.num_warps,
        registers=_number(r"REG:(\d+)", usage),
        spills=sum(ins.name in ("LDL", "STL") for ins in instructions),
        stack=_number(r"STACK:(\d+)", usage),
        shared=compiled.metadata.shared,
        loads=_widths(ins for ins in instructions if ins.loads),
        stores=_widths(ins for ins in instructions if ins.name == "STG"),
        bytes_in_flight=sass_flow.bytes_in_flight(steady),
        prologue_instructions=len(phases.prologue),
        main_loop_instructions=len(phases.main_loop),
        remainder_instructions=len(phases.remainder),
        epilogue_instructions=len(phases.epilogue),
        finaliser_instructions=len(phases.finaliser),
        epilogue_loops=phases.epilogue_loops,
        repeated_instructions=len(phases.repeated),
        main_loop_loads=_widths(ins for ins in phases.main_loop if ins.loads),
        text=text,
    )


def _report_amd(compiled: CompiledKernel, target: str) -> Report:
    text = compiled.asm["amdgcn"]
    widths = Counter((access, AMD_WIDTHS[kind]) for access, kind in AMD_ACCESS.findall(text))

    def figure(name: str) -> int:
        return _number(rf"\.{name}:\s+(\d+)", text)

    return Report(
        target=target,
        num_warps=compiled.metadata.num_warps,
        registers=figure("vgpr_count"),
        spills=figure("vgpr_spill_count"),  # scalar ones go to vector registers, not to memory
        stack=figure("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        loads={width: n for (access, width), n in widths.items() if access == "load"},
        stores={width: n for (access, width), n in widths.items() if access == "store"},
        text=text,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the tools say nothing like {pattern}")
    return int(found[1])


def _widths(instructions: Iterable[Instruction]) -> dict[int, int]:
    return dict(Counter(ins.width for ins in instructions))


def _disassembled(compiled: CompiledKernel) -> tuple[str, str]:
    """The SASS and the resource usage of a kernel, as text."""
    tools = triton.knobs.nvidia
    # -ndf: its dataflow analysis adds nothing here, and takes a third of the time
    return (
        _told(compiled, tools.nvdisasm.path, "-c", "-ndf"),
        _told(compiled, tools.cuobjdump.path, "--dump-resource-usage"),
    )


def _told(compiled: CompiledKernel, tool: str, *options: str) -> str:
    """What a tool says of a kernel. It is kept in Triton's cache, beside the kernel: the disassembler takes
    half a second to start."""
    cache, name = get_cache_manager(compiled.hash), "".join((Path(tool).name, *options))
    kept = cache.get_file(name)
    if kept is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            command = [tool, *options, file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kept = cache.put(said, name, binary=False)
    return Path(kept).read_text(encoding="utf-8")
