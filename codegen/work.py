"""What a launch does, whoever's kernel it is: counted from its machine code, and from some programs in the
middle of its grid, which are executed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from bnfast.ptx.execute import Arguments, Execution, Grid, program_of, run
from bnfast.ptx.program import CODES
from bnfast.ptx.traffic import SECTOR
from codegen import SMS, counts, sass

if TYPE_CHECKING:
    from codegen.launches import Launched

PROGRAMS = counts.PROGRAMS
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
    asks L2 for (`fetched`), those among them that it or a neighbour had loaded before (`again`), and bytes
    that it asked for but did not need (of `transferred`, `useful` ones are needed); wavefronts of shared
    memory; barriers. in_flight: bytes that an SM waits for at a time. resident: programs that fit on one."""

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

    @property
    def of_sm(self) -> int:
        """Programs of the SM that has most."""
        return -(-self.programs // SMS)


def of_kernel(
    name: str, code: Any, grid: Grid, given: Mapping[str, Any], final: Final | None = None
) -> Work:
    """code: Triton's compiled kernel. given: its arguments by name, tensors of the CPU, of whose values
    nothing depends but what is stored."""
    programs, report = grid[0] * grid[1] * grid[2], sass.report(code)
    middle = programs // 2
    some = range(middle, min(middle + PROGRAMS, programs))
    handed = Arguments.of(code, dict(given), watched=False)
    done = run(program_of(code), name, grid, code.metadata.shared, handed, 1, only=some, racing=True)
    n, distinct = len(some), {t.address: t for t in done.tensors.values()}.values()
    loaded, stored = _fetched(done)
    first_loaded = sum(int(t.moved[4]) for t in distinct)
    return Work(
        name, programs, report.num_warps, report.registers, report.spills,
        sass.occupancy(report.registers, report.num_warps, report.shared),
        sass.bytes_in_flight_per_sm(report, programs / SMS),
        len(FLOAT_ATOMICS.findall(code.asm["ptx"])),
        counts.instructions(done) / n, SECTOR * (loaded + stored) / n,
        SECTOR * max(0, loaded - first_loaded) / n,
        sum(t.loaded + t.stored for t in distinct) / n,
        SECTOR * sum(t.loaded_sectors + t.stored_sectors for t in distinct) / n,
        done.count("wavefronts") / n, done.totals["barriers"],
        tuple(
            Moved(t.address, _whole(int(t.moved[4]) * programs / n, t.size), _whole(int(t.moved[5]) * programs / n, t.size))
            for t in distinct
        ),
        final,
    )  # fmt: skip


def of_launched(launched: Launched) -> Work:
    """One of bnfast's, with what its last program does."""
    given, final = launched.arguments, None
    semaphores = given.get("semaphores_ptr")
    if semaphores is not None:
        done = launched.counts
        final = Final(done.final_barriers, done.final_round_trips)
        if given["splits"] > 1:  # else each is the last of its block
            semaphores.fill_(counts.NOBODY_IS_LAST)
    grid = launched.programs, 1, 1
    work = of_kernel(launched.kernel, launched.code, grid, given, final)
    if semaphores is not None:
        semaphores.zero_()
    return work


def _fetched(done: Execution) -> tuple[int, int]:
    """Sectors asked of L2 by loads, and by stores and atomics."""
    ops, fetched = done.program.code["op"], done.counters["fetched"]
    loads = ops == CODES["load"]
    return int(fetched[loads].sum()), int(fetched[~loads].sum())


def _whole(sectors: float, size: int) -> float:
    """Bytes of a tensor of this size in so many sectors, if no two are the same."""
    return min(sectors * SECTOR, -(-size // SECTOR) * SECTOR)


def untouched(given: Mapping[str, Any]) -> None:
    """Zeros in small tensors, as fresh memory has them: some kernels leave out what is not finite."""
    for each in given.values():
        if isinstance(each, Tensor) and each.nbytes < counts.FRESH:
            each.data.zero_()
