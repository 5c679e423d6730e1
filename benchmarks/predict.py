"""What a case moves, launches and needs, without a GPU: bytes and launches from the kernels' plan, and,
where this process can compile them, registers and bytes in flight from their machine code, and what they
execute (instructions, sectors, wavefronts, barriers, round trips) from programs of their compiled PTX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from benchmarks import model
from benchmarks.cases import columns
from benchmarks.records import PREDICTED, Record
from benchmarks.session import progress
from benchmarks.tables import FLOOR_LABEL, MODELLED, WITH_LAUNCHES
from bnfast import dispatch
from bnfast.kernels import batch_plan, group_plan
from bnfast.kernels.epilogue import EpiloguePlan
from codegen import SMS, why_not_counted
from codegen.cases import DIRECTIONS, Case

if TYPE_CHECKING:
    from codegen.launches import Launched


def counted(case: Case, direction: str) -> tuple[int, int]:
    """(bytes moved, kernels launched) by the forward or backward of a training step, as the kernels' own plan
    has them."""
    n, c, s = case.shape[0], case.shape[1], prod(case.shape[2:])
    # where both layouts describe x, the kernels see it as layouts.is_channels_last does
    memory = (case.dtype.itemsize, s == 1 or (case.channels_last and c > 1))
    epilogue = EpiloguePlan.of(case.activation or "none", case.residual, c, s, memory[1])
    planned: Any = batch_plan.batch_norm(n, c, s, *memory, sms=SMS, epilogue=epilogue)
    if case.groups:
        planned = group_plan.group_norm(n, c, s, case.groups, *memory, sms=SMS, epilogue=epilogue)
    return getattr(planned, f"{direction}_bytes"), getattr(planned, f"{direction}_launches")


def record(case: Case, direction: str, launched: list[Launched], why_not: str | None) -> Record:
    """us: as model.py has it. registers, in_flight_KB: of the kernel with the most, and with the least of
    those that go through x or dy."""
    moved, launches = counted(case, direction)
    found: dict[str, Any] = {"us": model.uncounted(moved, launches).all}
    if launched:

        def of_all(what: str) -> float:
            return sum(each.programs * getattr(each.counts, what) for each in launched)

        found = {
            "us": model.total(map(model.of_launch, launched)).all,
            "registers": max(each.report.registers for each in launched),
            "in_flight_KB": min(each.in_flight for each in launched if each.streams) / 1024,
            "instructions": sum(each.instructions * each.bytes for each in launched) / moved,
            "sector_MB": of_all("sectors") * 32e-6,
            "kwavefronts": of_all("wavefronts") / 1e3,
            "barriers": max(each.counts.barriers for each in launched),
            "round_trips": sum(each.counts.final_round_trips for each in launched),
            "versions": f"triton {dispatch.TRITON_VERSION}",
        }
    spilling = ", ".join(each.kernel for each in launched if each.report.spills)
    modelled = MODELLED if launched else WITH_LAUNCHES
    notes = [FLOOR_LABEL, modelled, why_not, spilling and f"spills: {spilling}"]
    found |= {name: round(value, 2) for name, value in found.items() if isinstance(value, float)}
    return Record(
        **columns(case), status=PREDICTED, variant="bnfast", direction=direction,
        ran=" ".join(each.kernel for each in launched), floor_bytes=moved, launches=launches,
        note="; ".join(filter(None, notes)), **found,
    )  # fmt: skip


def records(cases: Iterable[Case], compiled: bool = True) -> Iterator[Record]:
    """Forward and backward of each case, for an H200 (sm_90, so many multiprocessors as codegen.SMS). What
    several cases share is compiled once. compiled: whether to, where that can be done; it takes seconds."""
    why_not = why_not_counted() if compiled else "bytes and launches alone: not compiled"
    for case in progress(list(cases), desc="counting" if why_not else "compiling for an H200"):
        found: dict[str, list[Launched]] = {}
        if why_not is None:
            from codegen import launches  # needs Triton

            found = launches.of_case(case)
        for direction in DIRECTIONS:
            yield record(case, direction, found.get(direction, []), why_not)
