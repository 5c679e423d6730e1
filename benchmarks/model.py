"""How long a layer's launches take on an H200: a model. What goes in is counted; the constants below are
assumptions, to be calibrated on a GPU.

A launch takes as long as its bytes at the copy rate, or as what it asks L2 for, or as its instructions, or as
the loads that it has in flight and its barriers make it wait, whichever takes longest. To that are added
the gap between launches; the wavefronts of shared memory that an SM's programs need at the same time, while
nothing is loaded; and what the last program to arrive does alone, while all other SMs are idle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from codegen import SMS, sass

if TYPE_CHECKING:
    from codegen.launches import Launched
    from codegen.work import Work

COPY_RATE = 4.3e12  # bytes a second of global memory, read and written
LATENCY = 0.7  # microseconds that a load waits for global memory
CLOCK = 1.755e3  # cycles a microsecond
SLOTS = 4  # instructions of warps that an SM issues in a cycle
GAP = 1.5  # microseconds from one launch to the next on a stream
WAVEFRONT = 1  # cycles of shared memory
ROUND_TRIP = 390  # cycles that a program waits for what others have left in L2, with what it does about it
BARRIER = 30  # cycles
L2_RATE = 5.5e12  # bytes a second of L2
L2_LATENCY = 0.17  # microseconds that a load waits for L2
L2_KEEPS = 30e6  # bytes that are all still there when they are wanted again; of twice as many, none are
PORT = 64  # bytes that an SM takes from L2 in a cycle
ATOMIC = 900  # cycles of the atomic that acquires and releases, with its fences


class Modelled(NamedTuple):
    """Microseconds."""

    streaming: float
    gaps: float
    shared: float = 0.0
    finalizing: float = 0.0

    @property
    def all(self) -> float:
        return sum(self)


def floor(moved: Any) -> Any:
    """Microseconds that moving so many bytes takes."""
    return moved / COPY_RATE * 1e6


def uncounted(moved: int, launches: int) -> Modelled:
    """What is known of kernels that are not compiled."""
    return Modelled(floor(moved), launches * GAP)


class Demand(NamedTuple):
    """What a launch asks for. memory: bytes of global memory, to and fro. Of a program: bytes that it asks L2
    for (`fetched`), instructions of its warps, wavefronts and barriers. resident: programs that fit on an SM.
    in_flight: bytes that an SM waits for at a time. finalizing: cycles of the last program alone."""

    memory: float
    programs: int
    fetched: float
    instructions: float
    wavefronts: float
    barriers: int
    resident: int
    in_flight: float
    finalizing: float = 0.0

    @property
    def of_sm(self) -> int:
        """Programs of the SM that has most."""
        return -(-self.programs // SMS)


def modelled(asked: Demand, starved: bool = True) -> Modelled:
    """starved: whether loads and barriers are waited for."""
    all_fetched, resident = asked.programs * asked.fetched, max(1, asked.resident)
    bound = [
        floor(asked.memory),
        all_fetched / L2_RATE * 1e6,
        asked.fetched * asked.of_sm / PORT / CLOCK,
        asked.instructions * asked.of_sm / SLOTS / CLOCK,
    ]
    if starved:
        waited = asked.memory * LATENCY + max(0.0, all_fetched - asked.memory) * L2_LATENCY
        rounds = -(-asked.of_sm // resident)  # programs that run one after another
        bound.append(waited / (max(1.0, asked.in_flight) * SMS) + rounds * asked.barriers * BARRIER / CLOCK)
    shared = WAVEFRONT * min(asked.of_sm, resident) * asked.wavefronts
    return Modelled(max(bound), GAP, shared / CLOCK, asked.finalizing / CLOCK)


def finalizing(barriers: int, round_trips: int) -> float:
    """Cycles of a last program that passes so many barriers and waits so often for memory."""
    return ATOMIC + ROUND_TRIP * round_trips + BARRIER * barriers


def of_launch(launched: Launched) -> Modelled:
    """One of bnfast's, whose bytes all come from memory and go there, as its plan counts them."""
    code, done, last = launched.report, launched.counts, 0.0
    if launched.arguments.get("semaphores_ptr") is not None:
        last = finalizing(done.final_barriers, done.final_round_trips)
    resident = sass.occupancy(code.registers, code.num_warps, code.shared)
    return modelled(Demand(
        launched.bytes, launched.programs, 32 * done.sectors, done.instructions, done.wavefronts,
        done.barriers, resident, launched.in_flight, last,
    ))  # fmt: skip


def total(parts: Iterable[Modelled]) -> Modelled:
    return Modelled(*map(sum, zip(*parts, strict=True)))


class Readings(NamedTuple):
    """A call's microseconds, read in three ways: `model`, as of_work has it; `unstarved`, the same if loads
    and barriers were never waited for; and `sums`, of bytes, gaps, all wavefronts of shared memory and what
    last programs do. A comparison that all three agree on does not hang on how latency is modelled."""

    model: float
    unstarved: float
    sums: float


def demand(work: Work, found: float = 0.0) -> Demand:
    """A launch of anybody's. found: bytes that earlier launches of the call have left in L2."""
    final = work.final
    return Demand(
        from_memory(work, found), work.programs, work.fetched, work.instructions, work.wavefronts,
        work.barriers, work.resident, work.in_flight,
        finalizing(final.barriers, final.round_trips) if final else 0.0,
    )  # fmt: skip


def of_work(work: Work, found: float = 0.0, starved: bool = True) -> Modelled:
    return modelled(demand(work, found), starved)


def kept(touched: float) -> float:
    """The share of data that L2 still has after so many bytes were touched."""
    return min(1.0, max(0.0, 2 - touched / L2_KEEPS))


def from_memory(work: Work, found: float = 0.0) -> float:
    """Bytes of a launch that L2 does not have: each once, but for those `found` there; and those loaded
    again, as far as the programs that run at a time touch more than L2 keeps."""
    touched = (work.read + work.written) / work.programs * min(work.programs, work.resident * SMS)
    return work.read + work.written - found + work.programs * work.again * (1 - kept(touched))


def left_in_l2(call: Sequence[Work]) -> list[float]:
    """Bytes that each launch of a call finds in L2, which is cold at first: of a tensor that an earlier
    launch touched, what is kept after all that was touched since that launch began."""
    found, touched, since = [], 0.0, dict[int, float]()
    for work in call:
        known = [t for t in work.tensors if t.address in since]
        found.append(sum(t.read * kept(touched - since[t.address]) for t in known))
        since |= {t.address: touched for t in work.tensors}
        touched += work.read + work.written
    return found


def readings(call: Sequence[Work]) -> Readings:
    """Of all launches of a forward or backward."""
    asked = [demand(work, found) for work, found in zip(call, left_in_l2(call), strict=True)]
    with_all, unstarved = (total(modelled(each, starved) for each in asked).all for starved in (True, False))
    cycles = sum(WAVEFRONT * each.wavefronts * each.of_sm + each.finalizing for each in asked)
    sums = floor(sum(each.memory for each in asked)) + GAP * len(asked) + cycles / CLOCK
    return Readings(with_all, unstarved, sums)
