"""Executes the PTX of compiled kernels on the CPU, so that what Triton's compiler has made of a kernel is
tested without a GPU: its layouts, shared memory, barriers, shuffles, atomics and predicates.

    with executing() as launched:
        y = layer(x)          # a CPU tensor; the kernels are compiled for sm_90, and executed

Warps and programs are interleaved at random. A launch fails on a race between programs, between warps of one
or between lanes in shared memory, on an access out of bounds or misaligned, on a store to an input, and on a
load of memory that it only stores to later. So does one that may start before those ahead of it have
ended, if it stores, or loads what they store, before it waits for them. It shows neither the time that
anything takes nor faults of ptxas, since machine code is not executed.

It is stricter than the hardware in two ways: nothing may be stored to what several programs load, even by one
that has heard of all of them, and of a program only one warp acquires between two barriers. And it cannot see
that a launch loads what an earlier one should have stored, unless that memory holds NaN."""

from __future__ import annotations

from .execute import Execution, executing
from .library import MissingCompiler

__all__ = ["Execution", "MissingCompiler", "executing"]
