"""What a launch does, whoever's kernel it is: counted from its machine code, and from some of its programs,
which are executed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from bnfast.ptx.execute import Arguments, Execution, Grid, program_of, run
from bnfast.ptx.program import CODES
from bnfast.ptx.traffic import SECTOR
from codegen import SMS, counts, sass

if TYPE_CHECKING:
    from codegen.launches import Launched

FEW = 8e6  # bytes of a launch's tensors: if they are fewer, all of its programs are executed
SAMPLED = 64  # else about so many
OF_SM = 4  # of which so many run on one SM
L1 = 256 << 10  # bytes of an SM, of which shared memory takes its part
FLOAT_ATOMICS = re.compile(r"\b(?:atom|red)\.[\w.:]*add\.(?:noftz\.)?(?:b?f\d+)")


class Moved(NamedTuple):
    """Of one tensor, by where it begins: bytes that the launch reads and writes at least once, in sectors."""

    address: int
    read: float
    written: float


class Final(NamedTuple):
    """What the last program to arrive does beyond the others: barriers, and how often it waits for memory."""

    barriers: int
    round_trips: int


@dataclass(frozen=True)
class Work:
    """One launch. Of a program: instructions of its warps, about as many as in machine code; bytes that it
    asks L2 for (`fetched`), and those among them that had been loaded before (`again`); of all bytes in the
    sectors that it moves (`transferred`), the `useful` ones; wavefronts of shared memory; barriers.
    in_flight: bytes that an SM waits for at a time. resident: programs that fit on one."""

    kernel: str
    programs: int
    warps: int
    registers: int
    spills: int
    resident: int
    in_flight: float
    float_atomics: int
    instructions: float
    fetched: float
    again: float
    useful: float
    transferred: float
    wavefronts: float
    barriers: int
    tensors: tuple[Moved, ...] = field(repr=False)
    final: Final | None = None

    @property
    def read(self) -> float:
        return sum(t.read for t in self.tensors)

    @property
    def written(self) -> float:
        return sum(t.written for t in self.tensors)


def of_kernel(name: str, code: Any, grid: Grid, given: Mapping[str, Any], final: Final | None = None) -> Work:
    """code: Triton's compiled kernel. given: its arguments by name, tensors of the CPU, of whose values
    nothing depends but what is stored."""
    programs, report = grid[0] * grid[1] * grid[2], sass.report(code)
    resident = sass.occupancy(report.registers, report.num_warps, report.shared)
    of_one = L1 // max(1, min(resident, -(-programs // SMS))) - report.shared
    handed = Arguments.of(code, dict(given), watched=False)
    size = sum(size for _, size, *_ in handed.watched)
    some = range(programs) if size < FEW else samples(programs)
    done = run(
        program_of(code), name, grid, code.metadata.shared, handed, 1, only=some, racing=True,
        cached=(max(1, of_one // SECTOR), SMS),
    )  # fmt: skip
    n, distinct = len(some), {t.address: t for t in done.tensors.values()}.values()
    loaded, stored = _fetched(done, loads=True), _fetched(done, loads=False)
    every: np.ndarray = sum((t.moved for t in distinct), np.zeros(6, np.int64))
    return Work(
        name, programs, report.num_warps, report.registers, report.spills, resident,
        sass.bytes_in_flight_per_sm(report, programs / SMS), len(FLOAT_ATOMICS.findall(code.asm["ptx"])),
        counts.instructions(done) / n, SECTOR * (loaded + stored) / n,
        SECTOR * max(0, loaded - int(every[4])) / n, int(every[0] + every[1]) / n,
        SECTOR * int(every[2] + every[3]) / n, done.count("wavefronts") / n, done.totals["barriers"],
        tuple(
            Moved(t.address, *(_whole(int(sectors) * programs / n, t.size) for sectors in t.moved[4:]))
            for t in distinct
        ),
        final,
    )  # fmt: skip


def of_launched(launched: Launched) -> Work:
    """One of bnfast's, with what its last program does."""
    given, final = launched.arguments, None
    untouched(given)
    semaphores = given.get("semaphores_ptr")
    if semaphores is not None:
        done = launched.counts
        final = Final(done.final_barriers, done.final_round_trips)
        if given.get("splits", 1) > 1:  # else each is the last of its block
            semaphores.fill_(counts.NOBODY_IS_LAST)
    grid = launched.programs, 1, 1
    work = of_kernel(launched.kernel, launched.code, grid, given, final)
    if semaphores is not None:
        semaphores.zero_()
    return work


def samples(programs: int) -> list[int]:
    """Those that are executed: some in the middle of what some SMs run, or, where few have several, some that
    are spread over the grid."""
    if programs <= 2 * SMS:
        return list(range(0, programs, -(-programs // SAMPLED)))
    found: list[int] = []
    for k in range(SAMPLED // OF_SM):
        own = range(k * SMS * OF_SM // SAMPLED, programs, SMS)
        first = max(0, (len(own) - OF_SM) // 2)
        found += own[first : first + OF_SM]
    return found


def _fetched(done: Execution, loads: bool) -> int:
    """Sectors asked of L2 by loads, or by stores and atomics."""
    return int(done.counters["fetched"][(done.program.code["op"] == CODES["load"]) == loads].sum())


def _whole(sectors: float, size: int) -> float:
    """Bytes of a tensor of this size in so many sectors, if no two are the same."""
    return min(sectors * SECTOR, -(-size // SECTOR) * SECTOR)


def untouched(given: Mapping[str, Any]) -> None:
    """Zeros in small tensors, as fresh memory has them: some kernels leave out what is not finite."""
    for each in given.values():
        if isinstance(each, Tensor) and each.nbytes < counts.FRESH:
            each.data.zero_()
