"""The kernel behind the copy rate moves 16 bytes at a time, and does not spill."""

from __future__ import annotations

import pytest
import torch

from benchmarks import machine
from codegen.sass import bytes_in_flight_per_sm, compile_kernel

pytestmark = pytest.mark.static


def test_copy() -> None:
    """As launched for buffers whose addresses and sizes are multiples of 16. 48 KB in flight for each SM what
    it takes to hide the latency of an H200's memory."""
    x = torch.empty(1024)
    report = compile_kernel(machine.copy_kernel, x, x, 1024, TILE=machine.TILE)
    assert (report.spills, report.stack) == (0, 0)
    assert report.loads == report.stores == {16: machine.TILE * 4 // 16 // 128}  # by four warps
    assert bytes_in_flight_per_sm(report, 1000) >= 96 * 1024
