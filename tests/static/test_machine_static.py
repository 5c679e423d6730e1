"""The kernels behind the probes of the GPU move 16 bytes at a time, and none spills."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks.machine import kernels
from codegen.sass import Report, bytes_in_flight_per_sm, compile_kernel

pytestmark = pytest.mark.static

TILES = (*kernels.TILES, kernels.SMALLEST)
KINDS = {"n": "i32", "sums_ptr": "*fp32", "x_ptr": "*fp32", "y_ptr": "*fp32"}


def moving(kernel: Any, tile: int, **constants: Any) -> Report:
    """As launched for a buffer whose address and number of values are multiples of 16."""
    signature = {name: KINDS[name] for name in kernel.arg_names if name in KINDS}
    report = compile_kernel(kernel, signature, {"TILE": tile, **constants}, aligned=tuple(signature))
    assert (report.spills, report.stack) == (0, 0)
    return report


def each(tile: int) -> int:
    """How often a thread of four warps moves 16 bytes."""
    return tile * 4 // 16 // 128


@pytest.mark.parametrize("tile", TILES)
def test_copy(tile: int) -> None:
    report = moving(kernels.copy_kernel, tile)
    assert report.loads == report.stores == {16: each(tile)}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_read(tile: int, reverse: bool) -> None:
    report = moving(kernels.read_kernel, tile, REVERSE=reverse)
    assert report.loads == {16: each(tile)}
    assert report.stores == {4: 1}


@pytest.mark.parametrize("tile", TILES)
def test_write(tile: int) -> None:
    report = moving(kernels.write_kernel, tile, FACTOR=kernels.FACTOR)
    assert (report.loads, report.stores) == ({}, {16: each(tile)})


@pytest.mark.parametrize(
    ("kernel", "constants"), [(kernels.copy_kernel, {}), (kernels.read_kernel, {"REVERSE": False})]
)
def test_large_buffers_keep_memory_busy(kernel: Any, constants: dict[str, Any]) -> None:
    """48 KB in flight for each SM are what it takes to hide the latency of an H200's memory."""
    assert bytes_in_flight_per_sm(moving(kernel, max(kernels.TILES), **constants), 1000) >= 96 * 1024


def test_an_empty_kernel_is_empty() -> None:
    report = compile_kernel(kernels.empty_kernel, {"x_ptr": "*fp32"}, aligned=("x_ptr",))
    assert (report.loads, report.stores) == ({}, {})
    assert report.prologue_instructions == 2  # the stack's address, and the end


def test_programs_that_wait_look_at_the_counter_itself() -> None:
    """One atomic a barrier, and a look that goes past the SM's own cache, in a loop."""
    pointers = {"arrivals_ptr": "*i32", "missed_ptr": "*i32"}
    numbers = dict.fromkeys(("programs", "barriers", "patience"), "i32")
    report = compile_kernel(
        kernels.barrier_kernel, pointers | numbers, aligned=(*pointers, "barriers", "patience")
    )
    assert (report.spills, report.stack) == (0, 0)
    opcodes = re.findall(r"\b(?:ATOMG|RED|LDG|MEMBAR)\.[\w.]+", report.text)
    assert opcodes.count("ATOMG.E.ADD.STRONG.GPU") == 1
    assert opcodes.count("LDG.E.STRONG.GPU") == 1
    assert "MEMBAR.ALL.GPU" in opcodes
