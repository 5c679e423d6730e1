"""Other programs than the planned ones, timed: whether plan.py's choices are still the best on this GPU.

One of the plan's families of programs is replaced at a time: a case's time changes by those kernels alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pandas as pd
import torch

from benchmarks import measure
from benchmarks.cases import columns
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.timing import Spread, Stopwatch, in_turn, on_gpu, one_line, rotation
from codegen.cases import DIRECTIONS, Case

# (warps, programs an SM, registers a thread, 16-byte loads under way a thread); each is spill-free in the
# static tests' cases or shows itself slow here
CANDIDATES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "REDUCE": ((8, 2, 128, 8), (4, 4, 128, 8), (8, 3, 80, 4), (4, 6, 80, 4), (16, 1, 128, 8), (8, 4, 64, 4)),
    "REDUCE_NCHW": ((8, 4, 64, 4), (4, 8, 64, 4), (8, 2, 128, 8), (16, 2, 64, 4)),
    "MAPS": ((4, 7, 72, 4), (4, 8, 64, 4), (4, 6, 80, 4), (4, 4, 128, 8), (8, 4, 64, 4)),
}
KEEPS = 1.05  # a planned program this close to the best one stays


# of ResNet-50 at batch 256: large and middling planes, in both layouts
CASES = [
    Case("BatchNorm", (256, c, side, side), 0, torch.bfloat16, last, suite="sweep", network="ResNet-50")
    for c, side in ((64, 112), (256, 56), (512, 28), (1024, 14))
    for last in (True, False)
]


@contextlib.contextmanager
def planned_with(family: str, program: Sequence[int]) -> Iterator[None]:
    """Within, plans begin with this program; the smaller ones that small tensors get stay."""
    from bnfast.kernels import launch_plan, plan

    def forget() -> None:
        plan.plan_reduction.cache_clear()
        plan.plan_elementwise.cache_clear()
        launch_plan.forget_plans()

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
    (ours,) = measure.get(["bnfast"])
    for case in CASES if todo is None else todo:
        numbers = list(range(rotation(case.x_bytes)))
        tensors = measure.Tensors.of(case, device, len(numbers))
        for family, program in ((family, each) for family, several in CANDIDATES.items() for each in several):
            own = {"kind": "sweep", "variant": name(family, program), "cache": "cold", "mode": "eager"}
            shared = {**columns(case), **own}
            note = "planned" if is_planned(family, program) else ""  # within, every candidate is
            with planned_with(family, program):
                try:
                    calls = measure.Calls(ours.build(case, device), tensors)
                    for direction in DIRECTIONS:
                        timed = {0: calls.timed(direction, numbers)}
                        time = Spread.of(in_turn(timed, stopwatch, rounds)[0])
                        floor = measure.floor_bytes(case, direction)
                        yield Record(
                            **shared, status=MEASURED, direction=direction, floor_bytes=floor,
                            GBps=round(floor / time.us / 1e3, 1), note=note, **time.columns(),
                        )  # fmt: skip
                except Exception as e:  # the compiler's errors have many types
                    yield Record(**shared, status=CANNOT, note=one_line(e))


def beaten(found: pd.DataFrame) -> list[str]:
    """A line for each case and direction whose planned program is not among the best. Empty: the plan stands.

    found: records of `sweep`, of one GPU."""
    timed = found[(found["kind"] == "sweep") & (found["status"] == MEASURED)]
    family = timed["variant"].str.split(" ").str[0].rename("family")
    lines = []
    for where, group in timed.groupby([family, "shape", "dtype", "layout", "direction"], sort=False):
        best, own = group.loc[group["us"].idxmin()], group[group["note"] == "planned"]
        text = "{}, {} {} {}, {}".format(*where)
        if own.empty:
            lines.append(f"{text}: the planned program was not timed")
            continue
        ratio = own["us"].iloc[0] / best["us"]
        if ratio > KEEPS:
            planned = own["variant"].iloc[0]
            lines.append(f"{text}: {best['variant']} is {ratio:.2f} times as fast as {planned}")
    return lines
