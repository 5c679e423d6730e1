"""The job `compare`: what differs between the figures of two runs, and whether beyond their spread."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import report, tables
from benchmarks.records import MEASURED, OF_LAYERS, PREDICTED, Record
from benchmarks.show import load, origins

COUNTED = ("floor_bytes", "launches", "registers", "in_flight_KB")


@dataclass(frozen=True)
class Change:
    """One figure in both runs. sure: the quartiles of the two do not overlap; counted figures are sure."""

    what: str
    before: float
    after: float
    sure: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else math.inf


def changes(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """Of everything that is in both: times of what was measured, and all that is counted."""

    def identity(r: Record) -> tuple[object, ...]:
        return (r.status, r.kind, tables.Key.of(r), r.variant, r.direction, r.cache, r.mode)

    earlier = {identity(r): r for r in before}
    found = []
    for new in {identity(r): r for r in after}.values():
        old = earlier.get(identity(new))
        if old is None:
            continue
        name = " ".join(filter(None, [new.variant, label(new), new.direction, new.cache, new.mode]))
        if new.status == MEASURED and old.us and new.us:
            found.append(Change(f"{name}, us", old.us, new.us, apart(old, new)))
        if new.status == PREDICTED or new.kind == "kernels":
            for column in COUNTED:
                a, b = getattr(old, column), getattr(new, column)
                if a is not None and b is not None and a != b:
                    found.append(Change(f"{name}, {column}", a, b, True))
    return found


def label(r: Record) -> str:
    if r.kind in OF_LAYERS:
        return f"{r.network} {tables.Key.of(r).label} {r.dtype} {r.layout}"
    return r.shape


def apart(a: Record, b: Record) -> bool:
    """Whether the quartiles of two measurements do not overlap."""
    if None in (a.us_low, a.us_high, b.us_low, b.us_high):
        return False
    return (a.us_high or 0) < (b.us_low or 0) or (b.us_high or 0) < (a.us_low or 0)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Exits with 1 if a figure of bnfast's got worse beyond the spread, else with 0. Refused, which ends with
    2, if there are no figures."""
    try:
        before, after = load([options.before]), load([options.after])
    except ValueError as e:
        raise report.Refused(f"arguments before, after: {e}") from None
    for name, found in (("before", before), ("after", after)):
        for line in origins(found):
            report.paragraph(f"{name}: {line}")
    differ = changes(before, after)
    if not differ:
        report.paragraph("Nothing differs that both runs have.")
        return 0
    order = sorted(differ, key=lambda change: -abs(math.log(change.ratio)) if change.ratio > 0 else -math.inf)
    rows = [
        [c.what, f"{c.before:.4g}", f"{c.after:.4g}", f"{c.ratio:.3f}", "yes" if c.sure else "within spread"]
        for c in order[: options.top]
    ]
    print(report.table(["what", "before", "after", "ratio", "sure"], rows))
    times = [c.ratio for c in differ if c.what.endswith(", us") and c.what.startswith("bnfast")]
    if times:
        mean = math.exp(sum(map(math.log, times)) / len(times))
        report.paragraph(f"bnfast's times, geometric mean of {len(times)} ratios: {mean:.3f}")
    worse = [c for c in differ if c.sure and c.what.startswith("bnfast") and got_worse(c)]
    report.paragraph(f"{len(worse)} of {len(differ)} figures are worse for sure.")
    return int(bool(worse))


def got_worse(change: Change) -> bool:
    """Fewer bytes in flight are worse; of all else, more."""
    return change.ratio < 1 if change.what.endswith("in_flight_KB") else change.ratio > 1
