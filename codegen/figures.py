"""What is known of a kernel that a layer launches, without running it."""

from __future__ import annotations

from dataclasses import dataclass

from codegen import SMS, launches, sass
from codegen.cases import Case


@dataclass(frozen=True)
class Figures:
    """One launch. bytes: read and written. streams: whether it goes through x or dy, rather than add up what
    others have left. The rest is of its machine code for an H200, and None in the interpreter: registers a
    thread, shared: bytes a CTA, spills: instructions and bytes of stack, in_flight: bytes an SM waits for
    at a time, load: bytes of the average load, in the main loop if there is one."""

    kernel: str
    programs: int
    bytes: int
    streams: bool
    registers: int | None = None
    shared: int | None = None
    spills: int | None = None
    in_flight: float | None = None
    load: float | None = None


def of_launch(launched: launches.Launched) -> Figures:
    streams = not launched.arguments.keys().isdisjoint({"x_ptr", "dy_ptr"})
    counted = (launched.kernel, launched.programs, launched.bytes, streams)
    if launched.code is None:
        return Figures(*counted)
    code = sass.report(launched.code)
    in_flight = sass.bytes_in_flight_per_sm(code, launched.programs / SMS)
    loads = code.main_loop_loads or code.loads
    average = sum(width * times for width, times in loads.items()) / sum(loads.values())
    return Figures(*counted, code.registers, code.shared, code.spills + code.stack, in_flight, average)


def of_case(case: Case, training: bool = True) -> dict[str, list[Figures]]:
    """Forward and backward. Each kernel is compiled once, however many cases launch it."""
    found = launches.of_case(case, training)
    return {direction: [of_launch(each) for each in several] for direction, several in found.items()}
