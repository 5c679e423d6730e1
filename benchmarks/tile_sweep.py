"""Other programs than the planned ones, timed: whether plan.py's choices are still the best on this GPU.

One of the plan's families of programs is replaced at a time: a case's time changes by those kernels alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks import baselines, measure
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.stopwatch import Spread, Stopwatch, in_turn, on_gpu, rotation
from codegen.cases import Case

# (warps, programs an SM, registers a thread, 16-byte loads under way a thread); each is spill-free in the
# static tests' cases or shows itself slow here
CANDIDATES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "REDUCE": ((8, 2, 128, 8), (4, 4, 128, 8), (8, 3, 80, 4), (4, 6, 80, 4), (16, 1, 128, 8), (8, 4, 64, 4)),
    "REDUCE_RUNS": ((8, 4, 64, 4), (4, 8, 64, 4), (8, 2, 128, 8), (16, 2, 64, 4)),
    "MAPS": ((4, 7, 72, 4), (4, 8, 64, 4), (4, 6, 80, 4), (4, 4, 128, 8), (8, 4, 64, 4)),
}
KEEPS = 1.05  # a planned program this close to the best one stays


def cases() -> list[Case]:
    """Of ResNet-50 at batch 256: large and middling planes, in both layouts."""

    def case(c: int, side: int, last: bool) -> Case:
        shape = (256, c, side, side)
        return Case("sweep", "ResNet-50", "BatchNorm", shape, 0, torch.bfloat16, last)

    return [
        case(c, side, last)
        for c, side in ((64, 112), (256, 56), (512, 28), (1024, 14))
        for last in (True, False)
    ]


@contextlib.contextmanager
def planned_with(family: str, program: Sequence[int]) -> Iterator[None]:
    """Within, plans begin with this program; the smaller ones that small tensors get stay."""
    from bnfast.kernels import plan, steps

    def forget() -> None:
        plan.reduce_sweep.cache_clear()
        plan.map_sweep.cache_clear()
        steps.forget_plans()

    chosen = plan.Program(*program)
    own: dict[str, Any] = {family: (chosen, *getattr(plan, family)[1:])}
    if family == "MAPS":
        own["MAP"] = chosen
    forget()
    try:
        with mock.patch.multiple(plan, **own):
            yield
    finally:
        forget()


def name(family: str, program: Sequence[int]) -> str:
    return f"{family} {'/'.join(map(str, program))}"


def is_planned(family: str, program: Sequence[int]) -> bool:
    from bnfast.kernels import plan

    return bool(getattr(plan, family)[0] == plan.Program(*program))


def sweep(
    device: torch.device, todo: Sequence[Case] | None = None, stopwatch: Stopwatch = on_gpu, rounds: int = 7
) -> Iterator[Record]:
    """Forward and backward of each case with each candidate. note: "planned" for plan.py's own."""
    (ours,) = baselines.get(["bnfast"])
    for case in cases() if todo is None else todo:
        count = rotation(case.x_bytes)
        tensors, numbers = measure.Tensors.of(case, device, count), list(range(count))
        for family, candidates in CANDIDATES.items():
            for program in candidates:
                columns = {
                    **case.columns, "kind": "sweep", "variant": name(family, program),
                    "cache": "cold", "mode": "eager",
                }  # fmt: skip
                note = "planned" if is_planned(family, program) else ""  # within, every candidate is
                with planned_with(family, program):
                    try:
                        calls = measure.Calls(ours.build(case, device), tensors)
                        for direction in measure.DIRECTIONS:
                            timed = {0: calls.timed(direction, numbers)}
                            time = Spread.of(in_turn(timed, stopwatch, rounds=rounds)[0])
                            floor = measure.floor_bytes(case, direction)
                            yield Record(
                                **columns, status=MEASURED, direction=direction, floor_bytes=floor,
                                GBps=round(floor / time.us / 1e3, 1), note=note, **time.columns(),
                            )  # fmt: skip
                    except Exception as e:  # the compiler's errors have many types
                        yield Record(**columns, status=CANNOT, note=measure.one_line(e))


def beaten(found: Sequence[Record]) -> list[str]:
    """A line for each case and direction whose planned program is not among the best. Empty: the plan stands.

    found: records of `sweep`, of one GPU."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for r in found:
        if r.kind == "sweep" and r.status == MEASURED and r.us:
            family = r.variant.partition(" ")[0]
            groups.setdefault((family, r.shape, r.dtype, r.layout, r.direction), []).append(r)
    lines = []
    for (family, shape, dtype, layout, direction), group in groups.items():
        own = next((r for r in group if r.note == "planned"), None)
        best = min(group, key=lambda r: r.us or 0)
        if own is None:
            lines.append(
                f"{family}, {shape} {dtype} {layout}, {direction}: the planned program was not timed"
            )
        elif (own.us or 0) > KEEPS * (best.us or 0):
            ratio = (own.us or 0) / (best.us or 1)
            where = f"{shape} {dtype} {layout}, {direction}"
            lines.append(f"{where}: {best.variant} is {ratio:.2f} times as fast as {own.variant}")
    return lines
