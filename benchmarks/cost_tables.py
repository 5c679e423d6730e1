"""What layers take besides the GPU's time, as tables: the host's time, memory, and kernels by their names."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from benchmarks.kernels_run import SEPARATOR
from benchmarks.records import MEASURED, PREDICTED, Record
from benchmarks.tables import Key, Selection, Table
from codegen.cases import DIRECTIONS

NAME = 60  # characters of a kernel's name in a list; the CSV file has all of it
Reading = Callable[[Record], float | None]


def besides(records: Iterable[Record]) -> Table:
    """A row for each variant. host us: of an eager call, the median of the cases; in a graph: of forward and
    backward together, replayed. peak MB: of the case that takes most."""
    found = Selection([r for r in records if r.status == MEASURED and r.kind == "layer"]).where(cache="cold")
    headers = ("", "host us, fwd", "bwd", "both in a graph", "peak MB, fwd", "bwd")
    rows = []
    for variant in found.variants:
        own = found.where(variant=variant)
        ways = [own.where(direction=way, mode="eager") for way in DIRECTIONS]
        graphs = own.where(mode="graph")
        host = [_one(part, lambda r: r.host_us, statistics.median, ".1f") for part in (*ways, graphs)]
        peak = [_one(part, lambda r: r.peak_MB, max, ".0f") for part in ways]
        rows.append([variant, *host, *peak])
    return headers, rows


def _one(found: Selection, read: Reading, choose: Callable[[list[float]], float], form: str) -> str:
    """A figure of several; "-" where there is none."""
    values = [value for r in found.records if (value := read(r)) is not None]
    return format(choose(values), form) if values else "-"


def kernels(records: Sequence[Record]) -> Table:
    """How many kernels, forward+backward: as predicted for bnfast, and as counted of everybody."""
    counted = Selection([r for r in records if r.kind == "kernels" and r.status == MEASURED])
    plans = Selection([r for r in records if r.kind == "layer" and r.status == PREDICTED])
    rows = [
        [key.label, _both(plans, key, "bnfast"), *(_both(counted, key, name) for name in counted.variants)]
        for key in counted.keys
    ]
    return ("C x size", "predicted", *counted.variants), rows


def _both(found: Selection, key: Key, variant: str) -> str:
    ways = [found.where(direction=way).one(key, variant) for way in DIRECTIONS]
    return "+".join("-" if r is None or r.launches is None else f"{r.launches:.0f}" for r in ways)


def names(records: Iterable[Record]) -> list[str]:
    """Of each variant the kernels that it ran, and in how many calls of those that were looked at."""
    ran: dict[str, Counter[str]] = {}
    for r in records:
        if r.kind == "kernels" and r.ran:
            ran.setdefault(r.variant, Counter()).update(dict.fromkeys(map(short, r.ran.split(SEPARATOR)), 1))
    return [
        f"{variant}: {', '.join(f'{name} ({n})' for name, n in counts.most_common())}"
        for variant, counts in ran.items()
    ]


def short(name: str) -> str:
    """Without a C++ template's arguments and the function's."""
    return name.removeprefix("void ").partition("<")[0].partition("(")[0].strip()[:NAME] or name[:NAME]
