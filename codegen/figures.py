"""What is known of a kernel that a layer launches, without running it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from bnfast import dispatch
from codegen import SMS, budgets, launches, sass
from codegen.budgets import IN_FLIGHT, LOAD, REGISTERS
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


def of_case(case: Case) -> dict[str, list[Figures]]:
    """Forward and backward. Each kernel is compiled once, however many cases launch it."""
    found = launches.of_case(case)
    return {direction: [of_launch(each) for each in several] for direction, several in found.items()}


def lines(case: Case, figures: dict[str, list[Figures]]) -> pd.DataFrame:
    """The figures of a case as lines of budgets.csv, of the Triton that runs."""
    found: list[dict[str, object]] = []
    for direction, each in ((way, each) for way, several in figures.items() for each in several):
        found.append({"case": str(case), "direction": direction, "kernel": each.kernel})
        found[-1] |= {"launches": 1, "bytes": each.bytes}
        if each.in_flight is not None and each.load is not None:
            code = {REGISTERS: each.registers, IN_FLIGHT: round(each.in_flight / 1024, 1)}
            code[LOAD] = round(each.load, 1)
            found[-1] |= {f"{what} {dispatch.TRITON_VERSION}": figure for what, figure in code.items()}
    return budgets.table(pd.DataFrame(found))
