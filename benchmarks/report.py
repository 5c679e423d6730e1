"""The job `report`: tables and pictures of the CSV files of earlier runs, and the comparison of two of them.
The job `readme`: the section on performance of docs/benchmarks.md, which README links to. It is made from
benchmarks/results and nothing else."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks import ROOT, Refused, pictures, tables
from benchmarks.records import MEASURED, PREDICTED, load
from benchmarks.session import as_text, paragraph, section
from benchmarks.tables import COPY_RATE, COUNTED, IDENTITY, label
from codegen.cases import DIRECTIONS

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- performance: made by `python3 -m benchmarks readme` -->", "<!-- end of performance -->"
NOT_MEASURED = f"""\
**Not measured yet: no run on a GPU is recorded.** What follows is predicted for an H200: bytes and launches
(runs) are counted from the kernels' plan, registers and bytes in flight of an SM are read from the machine
code, and the floor is the time of those bytes at {COPY_RATE / 1e12:.1f} TB/s, an assumption. a/b is
forward/backward."""
MEASURED_BY = "Measured with L2 cold; `NAME x` is how many times as long somebody else takes."
TITLES = {"copy": "Copy, read and write rates", "step": "Training steps"}
NETWORK = ["network", "norm", "dtype", "layout"]


def origins(found: pd.DataFrame) -> list[str]:
    """Each machine, with versions and commit, that records come from."""
    rows = found[["gpu", "driver", "versions", "commit"]].drop_duplicates().to_numpy()
    return [
        f"{gpu or 'no GPU'}{', driver ' + driver if driver else ''}; {versions}; commit {commit}"
        for gpu, driver, versions, commit in rows
    ]


# tables and pictures


def show_predicted(found: pd.DataFrame) -> None:
    print("\nPREDICTED, not measured")
    print(as_text(tables.predicted(found)), flush=True)


def show_measured(found: pd.DataFrame) -> None:
    for direction in (*DIRECTIONS, "both"):
        title = {"both": "forward and backward in a CUDA graph"}.get(direction, direction)
        for table in tables.measured(found, direction):
            print(f"\nMEASURED, {title}")
            print(as_text(table), flush=True)
    table = tables.besides(found)
    if len(table):
        print("\nMEASURED, besides the GPU's time")
        print(as_text(table), flush=True)
    for line in (*tables.who_ran(found), *tables.refusals(found)):
        paragraph(line)


def show(found: pd.DataFrame, out: Path, lacking: Sequence[str]) -> None:
    for line in origins(found):
        paragraph(line)
    layers = found[found["kind"] == "layer"]
    for (network, *rest), own in layers.groupby(NETWORK, sort=False):
        section(f"{network}: {', '.join(rest)}")
        if (own["status"] == PREDICTED).any():
            show_predicted(own)
        if (own["status"] != PREDICTED).any():
            show_measured(own)
    for kind, rows in found[found["kind"] != "layer"].groupby("kind"):
        section(TITLES.get(kind, kind))
        print(as_text(tables.plain(rows)))
    if "matplotlib" not in lacking:
        draw(layers, out)


def draw(layers: pd.DataFrame, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        why = f"{out} is no folder and cannot be made one: {e.strerror}"
        raise Refused(f"argument --out: {why}") from None
    pictures.roofline(out / "roofline.png", layers)
    for names, own in layers.groupby(NETWORK, sort=False):
        pictures.layers(out / f"{'-'.join(names).replace(' ', '-')}.png", own, ", ".join(names))
    paragraph(f"Pictures are in {out}.")


# the comparison of two runs


def changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Of everything that is in both: what, before, after, ratio, sure. Times of what was measured: sure if
    the quartiles of the two do not overlap. Of what is counted, what differs, which is sure."""
    one, other = (each.drop_duplicates(IDENTITY, keep="last") for each in (before, after))
    both = one.merge(other, on=IDENTITY, suffixes=("", " after"))
    what = both.apply(name, axis=1) if len(both) else pd.Series(dtype=str)
    counted = both["status"].eq(PREDICTED)
    parts = []
    for column in ("us", *COUNTED):
        old, new = both[column], both[f"{column} after"]
        taken, sure = counted & old.notna() & new.notna() & (old != new), True
        if column == "us":
            taken = both["status"].eq(MEASURED) & (old > 0) & (new > 0)
            sure = (both["us_high"] < both["us_low after"]) | (both["us_high after"] < both["us_low"])
        table = pd.DataFrame({"what": what + f", {column}", "before": old, "after": new, "sure": sure})
        parts.append(table[taken])
    found = pd.concat(parts, ignore_index=True)
    return found.assign(ratio=(found["after"] / found["before"]).where(found["before"] > 0, math.inf))


def name(row: pd.Series) -> str:
    which = [row["shape"]]
    if row["kind"] == "layer":
        layer = label(row["shape"], row["residual"], row["activation"])
        which = [row["network"], layer, row["dtype"], row["layout"]]
    return " ".join(filter(None, [row["variant"], *which, row["direction"], row["cache"], row["mode"]]))


def compare(before: pd.DataFrame, after: pd.DataFrame, top: int) -> int:
    """Returns 1 if a figure of bnfast's got worse beyond the spread, else 0."""
    for which, found in (("before", before), ("after", after)):
        for line in origins(found):
            paragraph(f"{which}: {line}")
    differ = changes(before, after)
    if differ.empty:
        paragraph("Nothing differs that both runs have.")
        return 0
    logs = differ["ratio"].map(lambda ratio: abs(math.log(ratio)) if ratio > 0 else math.inf)
    first = differ.loc[logs.sort_values(ascending=False, kind="stable").index].head(top)
    table = {
        "what": first["what"], "before": [f"{value:.4g}" for value in first["before"]],
        "after": [f"{value:.4g}" for value in first["after"]], "ratio": [f"{r:.3f}" for r in first["ratio"]],
        "sure": ["yes" if sure else "within spread" for sure in first["sure"]],
    }  # fmt: skip
    print(as_text(pd.DataFrame(table)))
    ours = differ[differ["what"].str.startswith("bnfast")]
    times = ours[ours["what"].str.endswith(", us")]["ratio"]
    if len(times):
        mean = math.exp(times.map(math.log).mean())
        paragraph(f"bnfast's times, geometric mean of {len(times)} ratios: {mean:.3f}")
    fewer = ours["what"].str.endswith("in_flight_KB")  # fewer bytes in flight are worse; of all else, more
    worse = ours["sure"] & ((fewer & (ours["ratio"] < 1)) | (~fewer & (ours["ratio"] > 1)))
    paragraph(f"{worse.sum()} of {len(differ)} figures are worse for sure.")
    return int(worse.any())


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Refused, which ends with 2, if there are no figures."""
    if len(options.paths) > 2:
        raise Refused(
            f"argument PATH: one run is shown, two are compared, and these are {len(options.paths)}"
        )
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
            parts += [f"{title}, predicted:", markdown(tables.predicted(own))]
            continue
        for direction in DIRECTIONS:
            for table in tables.measured(own, direction):
                parts += [f"{title}, {direction}:", markdown(table)]
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
