"""Executes the PTX of compiled kernels on the CPU, so that what Triton's compiler has made of a kernel is
tested without a GPU: its layouts, shared memory, barriers, shuffles, atomics and predicates.

    with executing() as launched:
        y = layer(x)          # a CPU tensor; the kernels are compiled for sm_90, and executed

Warps and programs are interleaved at random. A launch fails on a race between programs, or between warps in
shared memory, on an access out of bounds or misaligned, on a store to an input, and on a load of
uninitialized memory. It shows neither the time that anything takes nor faults of ptxas, since machine code is
not executed."""

from __future__ import annotations

from .execute import Execution, executing
from .library import MissingCompiler

__all__ = ["Execution", "MissingCompiler", "executing"]
