"""What a program of a launch does, counted by executing compiled PTX: that of some programs in the middle of
the grid, none of which is the last to arrive if several share a block, and of one that is, and finalizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bnfast.ptx.execute import Arguments, Execution, program_of, run
from bnfast.ptx.program import CODES

# How many machine instructions ptxas makes of one of PTX, where that is not one: about, and of operands that
# are anything. test_counts_static.py holds the sums against machine code.
INSTRUCTIONS = {
    **dict.fromkeys(("move", "parameter", "unpack16", "unpack32", "pack32", "warp_sync"), 0.0),
    **dict.fromkeys(("add64", "sub64", "shl64", "shr_u64", "shr_s64", "mad_wide_s", "mul_wide_s"), 2.0),
    **dict.fromkeys(("mad_wide_u", "mul_wide_u", "mul_high_s16", "mul_high_u16", "add16x2"), 2.0),
    **dict.fromkeys(("mul64", "mad64", "exp2_f", "sqrt_f", "rsqrt_f"), 4.0),
    "div_f": 8.0,
    "sqrt_rn_f": 10.0,
    "div_rn_f": 12.0,
    **dict.fromkeys(("div_s32", "div_u32", "rem_s32", "rem_u32"), 20.0),
    **dict.fromkeys(("div_s64", "div_u64", "rem_s64", "rem_u64"), 70.0),
}
FRESH = 1 << 25  # bytes from which on an allocation is new memory
NOBODY_IS_LAST = 1 << 30  # in a counter: more than any number of programs
PROGRAMS = 4  # which are executed: neighbours, as they are of different blocks of channels
_INSTRUCTIONS = np.array([INSTRUCTIONS.get(name, 1.0) for name in CODES])


@dataclass(frozen=True)
class Counts:
    """Of a program: instructions of its warps, about as many as in machine code; 32-byte sectors that it
    moves; wavefronts of shared memory; barriers. final_: what the last to arrive does beyond that, and how
    often it waits for memory once it has arrived, each time after the last."""

    instructions: float
    sectors: float
    wavefronts: float
    barriers: int
    final_barriers: int = 0
    final_round_trips: int = 0


def instructions(executed: Execution) -> float:
    """Of its warps, about as many as in machine code."""
    return float(executed.counters["executed"] @ _INSTRUCTIONS[executed.program.code["op"]])


def counted(kernel: str, code: Any, programs: int, arguments: dict[str, Any]) -> Counts:
    """code: Triton's compiled kernel. programs: its grid. arguments: by name. Tensors are made to hold zeros,
    as fresh memory does: some stores are left out where a value is not finite, and so is the wait for it."""
    for given in arguments.values():
        if isinstance(given, Tensor) and given.nbytes < FRESH:
            given.data.zero_()
    program, handed = program_of(code), Arguments.of(code, arguments, watched=False)

    def executed(first: int, n: int) -> Execution:
        only = range(first, min(first + n, programs))
        return run(program, kernel, programs, code.metadata.shared, handed, 1, only=only, counting=False)

    semaphores, middle = arguments.get("semaphores_ptr"), programs // 2
    # that share a counter: those of a block, or, of those that hand over nothing, all
    sharing = arguments.get("splits", 1) if "partials_ptr" in arguments else programs
    if semaphores is not None and sharing > 1:
        semaphores.fill_(NOBODY_IS_LAST)
    some = executed(middle, PROGRAMS)
    n = min(PROGRAMS, programs - middle)
    mine = (
        instructions(some) / n,
        some.count("sectors") / n,
        some.count("wavefronts") / n,
        some.totals["barriers"],
    )
    if semaphores is None:
        return Counts(*mine)
    # One counter for each block of channels, then one for each sample whose blocks are merged.
    blocks = programs // sharing
    semaphores[:blocks] = sharing - 1
    semaphores[blocks:] = arguments["blocks"] - 1
    last = executed(middle, 1)
    if semaphores.count_nonzero() == len(semaphores):
        raise AssertionError(f"{kernel}: a program that is the last to arrive resets its counter")
    semaphores.zero_()
    return Counts(*mine, last.totals["barriers"] - mine[3], last.totals["final_round_trips"])
