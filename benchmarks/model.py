"""How long a layer's launches take on an H200: a model. What goes in is counted; the constants below are
assumptions, to be calibrated on a GPU.

A launch takes as long as its bytes at the copy rate, or as its instructions, or as the loads that it has in
flight wait for memory, whichever takes longest. To that are added the gap between launches; the wavefronts of
shared memory that an SM's programs need at the same time, while nothing is loaded; and what the last program
to arrive does alone, while all other SMs are idle."""

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


def of_launch(launched: Launched) -> Modelled:
    code, done = launched.report, launched.counts
    of_sm = -(-launched.programs // SMS)  # programs of the SM that has most
    issuing = done.instructions * of_sm / SLOTS / CLOCK
    waiting = launched.bytes / (launched.in_flight * SMS) * LATENCY
    resident = min(of_sm, sass.occupancy(code.registers, code.num_warps, code.shared))
    finalizing = 0
    if "semaphores_ptr" in launched.arguments:
        finalizing = ATOMIC + ROUND_TRIP * done.final_round_trips + BARRIER * done.final_barriers
    shared = WAVEFRONT * resident * done.wavefronts
    return Modelled(max(floor(launched.bytes), issuing, waiting), GAP, shared / CLOCK, finalizing / CLOCK)


def total(parts: Iterable[Modelled]) -> Modelled:
    return Modelled(*map(sum, zip(*parts, strict=True)))


class Readings(NamedTuple):
    """A call's microseconds, read in three ways: `model`, as of_work has it; `unstarved`, the same if loads
    and barriers were never waited for; and `sums`, of bytes, gaps, all wavefronts of shared memory and what
    last programs do. A comparison that all three agree on does not hang on how latency is modelled."""

    model: float
    unstarved: float
    sums: float


def of_work(work: Work, found: float = 0.0, starved: bool = True) -> Modelled:
    """A launch of anybody's, as of_launch, and beside that limited by L2: what is loaded again comes from
    there. found: bytes that earlier launches of the call have left in L2. starved: whether loads and barriers
    are waited for."""
    memory, everything = from_memory(work, found), work.programs * work.fetched
    issuing = work.instructions * work.of_sm / SLOTS / CLOCK
    through_port = work.fetched * work.of_sm / PORT / CLOCK
    running = min(work.of_sm, max(1, work.resident))
    waiting = 0.0
    if starved:
        of_l2 = max(0.0, everything - memory)
        in_flight = max(work.in_flight, 1.0) * SMS
        rounds = -(-work.of_sm // max(1, work.resident))
        waiting = (memory * LATENCY + of_l2 * L2_LATENCY) / in_flight
        waiting += rounds * work.barriers * BARRIER / CLOCK
    streaming = max(floor(memory), everything / L2_RATE * 1e6, issuing, through_port, waiting)
    shared = WAVEFRONT * running * work.wavefronts / CLOCK
    return Modelled(streaming, GAP, shared, _finalizing(work))


def _finalizing(work: Work) -> float:
    if work.final is None:
        return 0.0
    return (ATOMIC + ROUND_TRIP * work.final.round_trips + BARRIER * work.final.barriers) / CLOCK


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
    found = left_in_l2(call)
    pairs = list(zip(call, found, strict=True))
    model, unstarved = (
        total(of_work(work, had, starved) for work, had in pairs).all for starved in (True, False)
    )
    sums = sum(
        floor(from_memory(work, had)) + GAP + _finalizing(work)
        + WAVEFRONT * work.wavefronts * work.of_sm / CLOCK
        for work, had in pairs
    )  # fmt: skip
    return Readings(model, unstarved, sums)
