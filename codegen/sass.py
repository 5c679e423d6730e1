"""Kernels compiled with no GPU at hand, and what the machine code says about their speed.

The disassembler comes with Triton. Kernels must have been imported without TRITON_INTERPRET."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

from bnfast.kernels.launch import FP_FUSION
from bnfast.ptx.driver import fake_driver
from codegen.sass_flow import Code, Instruction

SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}  # bytes
AMD_ACCESS = re.compile(r"\b(?:global|buffer)_(load|store)_[us]?(dwordx[234]|dword|short|byte)")
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


@dataclass(frozen=True)
class Report:
    """A compiled kernel in numbers. Counts are of instructions in the text, unless they say otherwise."""

    target: str
    num_warps: int
    registers: int  # a thread
    spilling: int  # instructions that move registers to or from local memory; for AMD, registers that are
    stack: int  # bytes a thread
    shared: int  # bytes a CTA
    loads: Counter[int]  # from global memory: bytes a thread -> how many
    stores: Counter[int]
    sass: Code | None = field(default=None, repr=False)  # None for AMD

    @property
    def code(self) -> Code:
        assert self.sass is not None, f"the instructions of {self.target} are not read"
        return self.sass

    @property
    def spills(self) -> int:
        """0 if nothing is spilled: instructions, and bytes of the stack."""
        return self.spilling + self.stack

    @property
    def streamed(self) -> Counter[int]:
        """As `loads`, in the main loop if there is one that loads."""
        return (self.sass and _loads(self.sass.phases.main_loop)) or self.loads


def compile_kernel(
    kernel: triton.JITFunction, *arguments: Any, target: str = "sm_90", **options: Any
) -> Report:
    """Compile for one of fake_driver's TARGETS, as a launch with these arguments would, and report.

    options: compile-time constants by name, and what else a launch takes: num_warps, num_stages, maxnreg."""
    with fake_driver(target):
        return report(kernel[(1,)](*arguments, **{"enable_fp_fusion": FP_FUSION, **options}))


_reports: dict[str, Report] = {}


def report(compiled: CompiledKernel) -> Report:
    """What a compiled kernel came to. Reading the same code again costs nothing."""
    if compiled.hash not in _reports:
        read = _report_amd if compiled.metadata.target.backend == "hip" else _report_nvidia
        _reports[compiled.hash] = read(compiled)
    return _reports[compiled.hash]


def occupancy(registers: int, warps: int, shared: int, target: str = "sm_90") -> int:
    """CTAs that fit on one SM, given registers a thread, warps a CTA and bytes of shared memory a CTA."""
    # Each of an SM's four partitions has 16384 registers, handed to warps in units of 256, and 16 warps.
    warps_a_partition = min(16384 // (-(-registers * 32 // 256) * 256), 16)
    by_shared = SHARED_PER_SM[target] // (shared + 1024)  # the system keeps 1 KB a CTA
    return min(4 * warps_a_partition // warps, by_shared, 32)


def bytes_in_flight_per_sm(report: Report, planned_ctas_per_sm: float) -> float:
    """Bytes one SM waits for at a time, when the grid has so many CTAs for it and as many of them fit."""
    resident = occupancy(report.registers, report.num_warps, report.shared, report.target)
    return min(resident, planned_ctas_per_sm) * report.num_warps * 32 * report.code.bytes_in_flight


def _report_nvidia(compiled: CompiledKernel) -> Report:
    tools = triton.knobs.nvidia
    # -ndf: its dataflow analysis adds nothing here, and takes a third of the time
    code = Code(_told(compiled, tools.nvdisasm.path, "-c", "-ndf"))
    usage = _told(compiled, tools.cuobjdump.path, "--dump-resource-usage")
    return Report(
        f"sm_{compiled.metadata.target.arch}",
        compiled.metadata.num_warps,
        _number(r"REG:(\d+)", usage),
        sum(ins.name in ("LDL", "STL") for ins in code.instructions),
        _number(r"STACK:(\d+)", usage),
        compiled.metadata.shared,
        _loads(code.instructions),
        Counter(ins.width for ins in code.instructions if ins.name == "STG"),
        code,
    )


def _report_amd(compiled: CompiledKernel) -> Report:
    text = compiled.asm["amdgcn"]
    found = AMD_ACCESS.findall(text)
    return Report(
        compiled.metadata.target.arch,
        compiled.metadata.num_warps,
        _number(r"\.vgpr_count:\s+(\d+)", text),
        _number(r"\.vgpr_spill_count:\s+(\d+)", text),  # scalar ones go to vector registers, not to memory
        _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        compiled.metadata.shared,
        Counter(AMD_WIDTHS[kind] for access, kind in found if access == "load"),
        Counter(AMD_WIDTHS[kind] for access, kind in found if access == "store"),
    )


def _number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[0])


def _loads(instructions: Iterable[Instruction]) -> Counter[int]:
    return Counter(ins.width for ins in instructions if ins.loads)


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
