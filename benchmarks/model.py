"""How long a layer's launches take on an H200: a model. What goes in is counted; the constants below are
assumptions, to be calibrated on a GPU.

A launch takes as long as its bytes at the copy rate, or as its instructions, or as the loads that it has in
flight wait for memory, whichever takes longest. To that are added the gap between launches; the wavefronts of
shared memory that an SM's programs need at the same time, while nothing is loaded; and what the last program
to arrive does alone, while all other SMs are idle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from codegen import SMS, sass

if TYPE_CHECKING:
    from codegen.launches import Launched

COPY_RATE = 4.3e12  # bytes a second of global memory, read and written
LATENCY = 0.7  # microseconds that a load waits for global memory
CLOCK = 1.755e3  # cycles a microsecond
SLOTS = 4  # instructions of warps that an SM issues in a cycle
GAP = 1.5  # microseconds from one launch to the next on a stream
WAVEFRONT = 1  # cycles of shared memory
ROUND_TRIP = 390  # cycles that a program waits for what others have left in L2, with what it does about it
BARRIER = 30  # cycles
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
    if launched.arguments.get("semaphores_ptr") is not None:
        finalizing = ATOMIC + ROUND_TRIP * done.final_round_trips + BARRIER * done.final_barriers
    shared = WAVEFRONT * resident * done.wavefronts
    return Modelled(max(floor(launched.bytes), issuing, waiting), GAP, shared / CLOCK, finalizing / CLOCK)


def total(parts: Iterable[Modelled]) -> Modelled:
    return Modelled(*map(sum, zip(*parts, strict=True)))
