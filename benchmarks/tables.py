"""Records as tables: a row for each case, and one for all layers of the network. What was measured and what
was predicted are never in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import pandas as pd

from benchmarks.records import CANNOT, MEASURED, PREDICTED
from benchmarks.session import WIDTH, as_text
from codegen.cases import DIRECTIONS

COPY_RATE = 4.3e12  # bytes a second: assumed for an H200, and measured by nobody here
FLOOR_LABEL = f"floor at {COPY_RATE / 1e12:.1f} TB/s, an assumption: the copy rate of an H200"
BASELINES_A_TABLE = 4  # what fits a terminal
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
KEY = ["network", "norm", "groups", "shape", "dtype", "layout", "activation", "residual"]
IDENTITY = ["status", "kind", *KEY, "variant", "direction", "cache", "mode"]
COUNTED = ("floor_bytes", "launches", "registers", "in_flight_KB")


def floor(moved: Any) -> Any:
    """Microseconds that moving so many bytes takes at the assumed copy rate."""
    return moved / COPY_RATE * 1e6


def label(shape: str, residual: float, activation: str) -> str:
    """64 x 56x56 + z relu"""
    _, channels, *size = shape.split("x")
    after = " + z" * (residual == 1) + f" {activation}" * bool(activation)
    return f"{channels} x {'x'.join(size) or '1'}{after}"


def select(found: pd.DataFrame, **columns: str) -> pd.DataFrame:
    """The records of layers that have these values, with `case`, which tells layers apart, and its `label`.
    Of several of one thing the last one counts: a later run replaces an earlier one."""
    for name, value in columns.items():
        found = found[found[name] == value]
    found = found.drop_duplicates(IDENTITY, keep="last")
    labels = [label(*cells) for cells in found[["shape", "residual", "activation"]].to_numpy()]
    keys = ["|".join(map(str, row)) for row in found[KEY].to_numpy()]
    return found.assign(case=keys, label=labels)


def wide(found: pd.DataFrame, column: str, by: str = "variant") -> pd.DataFrame:
    """One of the columns: a row for each case in the order in which they first occur, bnfast's first."""
    table = found.pivot(index="case", columns=by, values=column).reindex(found["case"].unique())
    return table[sorted(found[by].unique(), key=lambda name: name != "bnfast")]


def cells(values: Iterable[float], form: str) -> list[str]:
    return [format(value, form) if value == value else "-" for value in values]


def predicted(found: pd.DataFrame) -> pd.DataFrame:
    """Counted, without a GPU; forward and backward as a/b. The last row is of all layers: the sums, but the
    most registers and the fewest bytes in flight. These two are left out where they are not known of any."""
    ours = select(found, status=PREDICTED, kind="layer", variant="bnfast")
    one = ours.drop_duplicates("case").set_index("case")
    count = one["count"].fillna(1)
    size = one["shape"].map(lambda shape: prod(map(int, shape.split("x")))) * one["dtype"].map(SIZES)

    def both(column: str, total: Callable[[pd.Series], float]) -> pd.DataFrame:
        """A column forward and backward, with a last row of all."""
        table = wide(ours, column, "direction")[list(DIRECTIONS)]
        return pd.concat([table, table.apply(total).to_frame("all").T])

    def added(values: pd.Series) -> float:
        return float((values * count).sum())

    moved, launches = both("floor_bytes", added), both("launches", added)
    registers = both("registers", lambda values: values.max(skipna=False))
    in_flight = both("in_flight_KB", lambda values: values.min(skipna=False))
    t = pd.Series([*size, (size * count).sum()]) / 1e6
    table = pd.DataFrame({
        "C x size": [*one["label"], "all"], "layers": cells([*count, count.sum()], ".0f"),
        "T MB": cells(t, ".1f"),
        "fwd MB": cells(moved["forward"] / 1e6, ".0f"), "bwd MB": cells(moved["backward"] / 1e6, ".0f"),
        "runs": pairs(launches, "+"), "regs": pairs(registers), "KB in flight": pairs(in_flight),
        "floor us": ["/".join(map(short_us, row)) for row in floor(moved).to_numpy()],
    })  # fmt: skip
    return table.loc[:, [name for name in table if set(table[name]) != {"-"}]]


def short_us(us: float) -> str:
    return f"{us:.0f}" if us >= 10 else f"{us:.1f}"


def pairs(both: pd.DataFrame, between: str = "/") -> list[str]:
    """ "a/b"; "-" where nothing is known."""
    rows = zip(*(cells(both[name], ".0f") for name in both), strict=True)
    return ["-" if row == ("-", "-") else between.join(row) for row in rows]


def measured(found: pd.DataFrame, direction: str) -> list[pd.DataFrame]:
    """Ours in microseconds with L2 cold and warm and as a share of the copy rate of the same run; how many
    times as long each of the others takes, L2 cold. More than one table if there are many others."""
    mode = "graph" if direction == "both" else "eager"
    rows = select(found, status=MEASURED, kind="layer", direction=direction, mode=mode)
    cold, warm = rows[rows["cache"] == "cold"], rows[rows["cache"] == "warm"]
    if cold.empty:
        return []
    one = cold.drop_duplicates("case").set_index("case")
    count = one["count"].fillna(1)
    times, nothing = wide(cold, "us"), pd.Series(float("nan"), one.index)
    ours, rate = times.get("bnfast", nothing), wide(cold, "GBps").get("bnfast", nothing)
    again = wide(warm, "us").reindex(one.index).get("bnfast", nothing) if len(warm) else nothing
    others = [name for name in times if name != "bnfast"]

    def total(values: pd.Series) -> float:
        """Of all layers; NaN if one is not there."""
        return float((values * count).sum(skipna=False))

    def table(names: list[str]) -> pd.DataFrame:
        columns = {
            "C x size": [*one["label"], "all layers"], "layers": cells([*count, count.sum()], ".0f"),
            "us": [*cells(ours, ".1f"), *cells([total(ours)], ".0f")],
            "GB/s": [*cells(rate, ".0f"), ""],
            "% of copy": [*cells(100 * rate / one["copy_GBps"], ".0f"), ""],
            "warm us": [*cells(again, ".1f"), *cells([total(again)], ".0f")],
        }  # fmt: skip
        for name in names:
            columns[f"{name} x"] = cells([*times[name] / ours, total(times[name]) / total(ours)], ".2f")
        return pd.DataFrame(columns)

    starts = range(0, max(1, len(others)), BASELINES_A_TABLE)
    return [table(others[start : start + BASELINES_A_TABLE]) for start in starts]


def refusals(found: pd.DataFrame) -> list[str]:
    """Who could not run what, and why: a line for each reason."""
    times = found[found["status"] == CANNOT].groupby(["variant", "note"], sort=False).size()
    return [f"{variant}: {note} ({n} of them)" for (variant, note), n in times.items()]


def who_ran(found: pd.DataFrame) -> list[str]:
    """What each variant's name stands for, as it really ran."""
    ran = found[(found["status"] == MEASURED) & (found["kind"] == "layer") & (found["ran"] != "")]
    names = ran.groupby("variant", sort=False)["ran"].unique()
    return [f"{variant}: {', '.join(sorted(each))}" for variant, each in names.items()]


def besides(found: pd.DataFrame) -> pd.DataFrame:
    """A row for each variant. host us: of an eager call, the median of the cases; in a graph: of forward and
    backward together, replayed. peak MB: of the case that takes most."""
    rows = select(found, status=MEASURED, kind="layer", cache="cold")
    rows = rows[rows["direction"].isin([*DIRECTIONS, "both"])]
    host = rows.pivot_table("host_us", "variant", "direction", "median", sort=False, dropna=False)
    peak = rows.pivot_table("peak_MB", "variant", "direction", "max", sort=False, dropna=False)
    names = sorted(rows["variant"].unique(), key=lambda name: name != "bnfast")
    ways = {"host us, fwd": "forward", "bwd": "backward", "both in a graph": "both"}
    host, peak = (each.reindex(names, columns=[*DIRECTIONS, "both"]) for each in (host, peak))
    table = {"": names, **{title: cells(host[way], ".1f") for title, way in ways.items()}}
    peaks = {"peak MB, fwd": cells(peak["forward"], ".0f"), "bwd ": cells(peak["backward"], ".0f")}
    return pd.DataFrame(table | peaks)


def plain(found: pd.DataFrame) -> pd.DataFrame:
    """A line a record, for what is no layer: bandwidths, probes, training steps, tile sweeps."""
    where = [" ".join(filter(None, row)) for row in found[["direction", "cache", "mode"]].to_numpy()]
    table = pd.DataFrame({
        "what": found["variant"], "size": found["shape"].where(found["shape"] != "", found["ran"]),
        "where": where,
        "us": cells(found["host_us"].fillna(found["us"]), ".1f"), "GB/s": cells(found["GBps"], ".0f"),
        "peak MB": cells(found["peak_MB"], ".0f"), "note": "",
    })  # fmt: skip
    # a note has what the others leave; the CSV file has all of it
    room = WIDTH - (max(map(len, as_text(table).splitlines())) if len(table) else 0)
    room = max(len("note"), room + len("note") - 1)
    notes = [note if len(note) <= room else note[: room - 3] + "..." for note in found["note"]]
    return table.assign(note=notes)
