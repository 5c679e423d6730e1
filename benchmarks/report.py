"""The job `report`: tables and pictures of the CSV files of earlier runs, and the comparison of two of them.
The job `readme`: the section on performance of docs/benchmarks.md, which README links to. It is made from
benchmarks/results and nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import ROOT, Refused, pictures, tables
from benchmarks.model import COPY_RATE
from benchmarks.records import MEASURED, PREDICTED, load
from benchmarks.session import as_text, paragraph, section
from benchmarks.tables import IDENTITY, NETWORK, cells
from codegen.cases import DIRECTIONS

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- performance: made by `python3 -m benchmarks readme` -->", "<!-- end of performance -->"
NOT_MEASURED = f"""\
**Not measured yet: no run on a GPU is recorded.** What follows is predicted for an H200: bytes and launches
are counted from the kernels' plan, and all else from the compiled kernels: registers, bytes in flight of an
SM, and, by executing them, about how many machine instructions a thread issues for 16 bytes (an estimate from
PTX), 32-byte sectors, thousands of wavefronts of shared memory (kwavefr), barriers, and how often the
programs that finalize wait for memory. The floor is the time of the bytes at {COPY_RATE / 1e12:.1f} TB/s, and
the modelled time is that of `benchmarks/model.py`, whose constants are assumptions. a/b is
forward/backward."""
CODE = (
    "COUNTED: registers of a thread (regs) and the bytes that an SM has in flight are read from the kernels' "
    "machine code for an H100 or H200. By executing their PTX: about how many machine instructions a thread "
    "issues for 16 bytes (instr, an estimate), MB in 32-byte sectors, thousands of wavefronts of shared "
    "memory (kwavefr), barriers of a program, and how often the programs that finalize wait for memory "
    "(trips)."
)
MEASURED_BY = "Measured with L2 cold; `NAME x` is how many times as long somebody else takes."


def origins(found: pd.DataFrame) -> list[str]:
    """Each machine, with versions and commit, that records come from."""
    rows = found[["gpu", "driver", "versions", "commit"]].drop_duplicates().to_numpy()
    return [
        f"{gpu or 'no GPU'}{', driver ' + driver if driver else ''}; {versions}; commit {commit}"
        for gpu, driver, versions, commit in rows
    ]


# tables and pictures


def titled(title: str, table: pd.DataFrame) -> None:
    if len(table):
        print(f"\n{title}\n{as_text(table)}", flush=True)


def show_layers(found: pd.DataFrame) -> None:
    """What there is of predictions, times, and reasons why there are none."""
    titled("PREDICTED, not measured", tables.predicted(found))
    titled("COUNTED, of the compiled kernels", tables.counted(found))
    for direction in DIRECTIONS:
        titled(f"MEASURED, {direction}", tables.measured(found, direction))
    titled("MEASURED, forward and backward in a CUDA graph", tables.measured(found, "both"))
    for line in (*tables.who_ran(found), *tables.refusals(found)):
        paragraph(line)


def show_steps(found: pd.DataFrame) -> None:
    """A table for each batch size."""
    for names, own in found.groupby(["network", "shape", "dtype", "layout"], sort=False):
        titled(", ".join(names), tables.steps(own))
        for line in tables.refusals(own):
            paragraph(f"Cannot: {line}")


def show(found: pd.DataFrame, out: Path, lacking: Sequence[str]) -> None:
    for line in origins(found):
        paragraph(line)
    layers = found[found["kind"] == "layer"]
    if layers["registers"].notna().any():
        paragraph(CODE)
    for names, own in layers.groupby(NETWORK, sort=False):
        section(", ".join(names))
        show_layers(own)
    for kind, rows in found[found["kind"] != "layer"].groupby("kind"):
        section({"copy": "Copy rates", "step": "Training steps"}.get(kind, kind))
        if kind == "step":
            show_steps(rows)
        else:
            print(as_text(tables.plain(rows)))
    if "matplotlib" not in lacking:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise Refused(f"argument --out: {out} cannot be made a folder: {e.strerror}") from None
        pictures.layers(out, layers)
        pictures.roofline(out / "roofline.png", layers)
        paragraph(f"Pictures are in {out}.")


# the comparison of two runs


def changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """The times of everything that both have measured, the largest change first, with their ratio and whether
    it is sure, as the quartiles do not overlap."""
    one, two = (
        found[(found["status"] == MEASURED) & (found["us"] > 0)].drop_duplicates(IDENTITY, keep="last")
        for found in (before, after)
    )
    both = one.merge(two, on=IDENTITY, suffixes=("", "_after"))
    sure = (both["us_high"] < both["us_low_after"]) | (both["us_high_after"] < both["us_low"])
    both = both.assign(ratio=both["us_after"] / both["us"], sure=sure)
    return both.loc[np.log(both["ratio"]).abs().sort_values(ascending=False, kind="stable").index]


def name(row: pd.Series) -> str:
    what = row["shape"] + " + z" * (row["residual"] == 1)
    words = [row["variant"], row["network"], what, *row[["activation", "dtype", "layout"]]]
    return " ".join(filter(None, [*words, *row[["direction", "cache", "mode"]]]))


def compare(before: pd.DataFrame, after: pd.DataFrame, top: int) -> int:
    """Returns 1 if a time of bnfast's got worse beyond the spread, else 0."""
    for which, found in (("before", before), ("after", after)):
        for line in origins(found):
            paragraph(f"{which}: {line}")
    differ = changes(before, after)
    if differ.empty:
        paragraph("Nothing was measured in both runs.")
        return 0
    first = differ.head(top)
    print(as_text(pd.DataFrame({
        "what": [name(row) for _, row in first.iterrows()], "before us": cells(first["us"], ".4g"),
        "after us": cells(first["us_after"], ".4g"), "ratio": cells(first["ratio"], ".3f"),
        "sure": ["yes" if sure else "within spread" for sure in first["sure"]],
    })))  # fmt: skip
    ours = differ[differ["variant"] == "bnfast"]
    worse = ours["sure"] & (ours["ratio"] > 1)
    mean = np.exp(np.log(ours["ratio"]).mean())
    paragraph(
        f"bnfast: {worse.sum()} of {len(ours)} times are worse for sure; geometric mean of ratios: {mean:.3f}"
    )
    return int(worse.any())


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Refused, which ends with 2, if there are no figures."""
    if len(options.paths) > 2:
        count = len(options.paths)
        raise Refused(f"argument PATH: one run is shown, two are compared, and these are {count}")
    try:
        found = [load([path]) for path in options.paths]
    except ValueError as e:
        raise Refused(f"argument PATH: {e}") from None
    if len(found) == 2:
        return compare(found[0], found[1], options.top)
    first = options.paths[0]
    show(found[0], options.out or (first if first.is_dir() else first.parent), lacking)
    return 0


# docs/benchmarks.md


def markdown(table: pd.DataFrame) -> str:
    rows = [list(table), ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def readme_section(found: pd.DataFrame) -> str:
    """Markdown. What was measured on a GPU, or else what is predicted and labelled so."""
    measured = found[(found["status"] == MEASURED) & (found["kind"] == "layer") & (found["gpu"] != "")]
    parts = [NOT_MEASURED] if measured.empty else [MEASURED_BY, *(f"- {line}" for line in origins(measured))]
    rows = found[found["status"] == PREDICTED] if measured.empty else measured
    for (network, norm, dtype, layout), own in rows.groupby(NETWORK, sort=False):
        batch = own["shape"].iloc[0].partition("x")[0]
        title = f"{network}, {norm}, batch {batch}, {dtype}, {layout}"
        if measured.empty:
            parts += [f"{title}, predicted:", markdown(tables.predicted(own)), markdown(tables.counted(own))]
            continue
        for direction in DIRECTIONS:
            table = tables.measured(own, direction)
            parts += [f"{title}, {direction}:", markdown(table)] if len(table) else []
        parts.append(f"Who computed: {'; '.join(tables.who_ran(own))}.")
    return "\n\n".join(parts)


def renewed(text: str, found: pd.DataFrame) -> str:
    """The page with its section made anew. Raises ValueError if the marks of the section are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no section between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{readme_section(found)}\n\n{END}{after}"


def write_readme(options: argparse.Namespace, lacking: list[str]) -> int:
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), load([RESULTS])), encoding="utf-8")
    return 0
