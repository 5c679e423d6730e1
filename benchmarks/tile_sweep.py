"""Other programs than the planned ones, timed: whether plan.py's choices are still the best on this GPU.

One of the plan's families of programs is replaced at a time: a case's time changes by those kernels alone."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from unittest import mock

import pandas as pd
import torch

from benchmarks import measure
from benchmarks.records import MEASURED, Record
from codegen.cases import Case

# warps, programs an SM, registers a thread, 16-byte loads under way a thread
Program = tuple[int, int, int, int]
# Each is spill-free in the static tests' cases or shows itself slow here.
CANDIDATES: dict[str, tuple[Program, ...]] = {
    "REDUCE": ((8, 2, 128, 8), (4, 4, 128, 8), (8, 3, 80, 4), (4, 6, 80, 4), (16, 1, 128, 8), (8, 4, 64, 4)),
    "REDUCE_NCHW": ((8, 4, 64, 4), (4, 8, 64, 4), (8, 2, 128, 8), (16, 2, 64, 4)),
    "ELEMENTWISE": ((4, 7, 72, 4), (4, 8, 64, 4), (4, 6, 80, 4), (4, 4, 128, 8), (8, 4, 64, 4)),
}
KEEPS = 1.05  # a planned program this close to the best one stays
PLANNED = "planned"  # in the note of a record
METHOD = measure.Method(rounds=7, caches=("cold",), graph=False)
# of ResNet-50 at batch 256: large and middling planes, in both layouts
CASES = [
    Case("BatchNorm", (256, c, side, side), 0, torch.bfloat16, last, suite="sweep", network="ResNet-50")
    for c, side in ((64, 112), (256, 56), (512, 28), (1024, 14))
    for last in (True, False)
]


@contextlib.contextmanager
def planned_with(family: str, program: Program) -> Iterator[bool]:
    """Within, plans begin with this program; the smaller ones that small tensors get stay. Gives whether that
    is plan.py's own."""
    from bnfast.kernels import launch_plan, plan

    def forget() -> None:
        plan.plan_reduction.cache_clear()
        plan.plan_elementwise.cache_clear()
        launch_plan.forget_plans()

    chosen, planned = plan.Program(*program), getattr(plan, family)
    forget()
    try:
        with mock.patch.object(plan, family, (chosen, *planned[1:])):
            yield bool(planned[0] == chosen)
    finally:
        forget()


def sweep(device: torch.device) -> Iterator[Record]:
    """Forward and backward of each case with each candidate."""
    candidates = [(family, each) for family, several in CANDIDATES.items() for each in several]
    for case, (family, program) in itertools.product(CASES, candidates):
        with planned_with(family, program) as planned:
            for record in measure.of_case(case, measure.get(["bnfast"]), device, METHOD):
                note = "; ".join(filter(None, (PLANNED * planned, record.note)))
                name = f"{family} {'/'.join(map(str, program))}"
                yield dataclasses.replace(record, kind="sweep", variant=name, note=note)


def beaten(found: pd.DataFrame) -> list[str]:
    """A line for each case and direction whose planned program is not among the best. Empty: the plan stands.

    found: records of `sweep`, of one GPU."""
    timed = found[(found["kind"] == "sweep") & (found["status"] == MEASURED)]
    timed = timed.assign(family=timed["variant"].str.partition(" ")[0])
    lines = []
    for where, group in timed.groupby(["family", "shape", "dtype", "layout", "direction"], sort=False):
        best, own = group.loc[group["us"].idxmin()], group[group["note"].str.startswith(PLANNED)]
        ratio = own["us"].min() / best["us"]  # NaN where the planned program was not timed
        if not ratio <= KEEPS:
            text = "{}, {} {} {}, {}".format(*where)
            lines.append(f"{text}: {best['variant']} is {ratio:.2f} times as fast as the planned program")
    return lines
