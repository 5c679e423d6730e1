"""README's section on performance, made from the CSV files in benchmarks/results and from nothing else.

python3 -m benchmarks readme    write it anew; a test holds README against it"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import show, tables
from benchmarks.records import MEASURED, PREDICTED, Record
from codegen.cases import DIRECTIONS

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
BEGIN, END = "<!-- performance: made by `python3 -m benchmarks readme` -->", "<!-- end of performance -->"
NOT_MEASURED = f"""\
**Not measured yet: no run on a GPU is recorded.** What follows is predicted for an H200: bytes and launches
(runs) are counted from the kernels' plan, registers and bytes in flight of an SM are read from the machine
code, and the floor is the time of those bytes at {tables.COPY_RATE / 1e12:.1f} TB/s, an assumption. a/b is
forward/backward."""
MEASURED_BY = "Measured with L2 cold; `NAME x` is how many times as long somebody else takes."


def block(table: tables.Table) -> str:
    headers, rows = table
    lines = ["| " + " | ".join(cells) + " |" for cells in (headers, ["---"] * len(headers), *rows)]
    return "\n".join(lines)


def section(found: Sequence[Record]) -> str:
    """Markdown. What was measured on a GPU, or else what is predicted and labelled so."""
    measured = [r for r in found if r.status == MEASURED and r.kind == "layer" and r.gpu]
    parts = []
    if not measured:
        parts.append(NOT_MEASURED)
    else:
        parts += [MEASURED_BY, *(f"- {line}" for line in show.origins(measured))]
    groups = dict.fromkeys(
        (r.network, r.norm, r.dtype, r.layout)
        for r in measured or [r for r in found if r.status == PREDICTED]
    )
    for network, norm, dtype, layout in groups:
        own = [r for r in found if (r.network, r.norm, r.dtype, r.layout) == (network, norm, dtype, layout)]
        batch = own[0].shape.partition("x")[0]
        title = f"{network}, {norm}, batch {batch}, {dtype}, {layout}"
        if not measured:
            parts += [f"{title}, predicted:", block(tables.predicted(own))]
        for direction in DIRECTIONS:
            for table in tables.measured(own, direction):
                if table[1]:
                    parts += [f"{title}, {direction}:", block(table)]
        if measured:
            parts.append(f"Who computed: {'; '.join(tables.who_ran(own))}.")
    return "\n\n".join(parts)


def renewed(text: str, found: Sequence[Record]) -> str:
    """README with its section made anew. ValueError if the marks of the section are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README has no section between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{section(found)}\n\n{END}{after}"


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    README.write_text(renewed(README.read_text(encoding="utf-8"), show.load([RESULTS])), encoding="utf-8")
    return 0
