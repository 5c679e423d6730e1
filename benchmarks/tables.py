"""Records as tables: a row for each case, and one for all layers of the network. What was measured and what
was predicted are never in one table."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import pandas as pd

from benchmarks.records import CANNOT, MEASURED, PREDICTED
from benchmarks.session import WIDTH, as_text
from codegen.cases import DIRECTIONS

COPY_RATE = 4.3e12  # bytes a second: assumed for an H200, not measured in this project
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
    for name, value in {"kind": "layer", **columns}.items():
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


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def known(table: pd.DataFrame) -> pd.DataFrame:
    """Without the columns that say nothing."""
    return table.loc[:, [name for name in table if set(table[name]) != {"-"}]]


def predicted(found: pd.DataFrame) -> pd.DataFrame:
    """Counted, without a GPU; forward and backward as a/b. The last row is of all layers: the sums, but the
    most registers and the fewest bytes in flight. These two are left out where they are not known of any."""
    ours = select(found, status=PREDICTED, variant="bnfast")
    one = ours.drop_duplicates("case").set_index("case")
    count = one["count"].fillna(1)
    size = one["shape"].map(lambda shape: prod(map(int, shape.split("x")))) * one["dtype"].map(SIZES) / 1e6

    def both(column: str, scale: float = 1, total: str = "sum") -> list[str]:
        values = wide(ours, column, "direction")[list(DIRECTIONS)] * scale
        added = values.mul(count, axis=0).sum()
        values.loc["all"] = added if total == "sum" else values.agg(total, skipna=False)
        show = short if scale != 1 else "{:.0f}".format
        return ["-" if row.isna().any() else "/".join(map(show, row)) for _, row in values.iterrows()]

    return known(pd.DataFrame({
        "C x size": [*one["label"], "all"], "layers": cells([*count, count.sum()], ".0f"),
        "T MB": cells([*size, (size * count).sum()], ".1f"),
        "MB moved": both("floor_bytes", 1e-6), "launches": both("launches"),
        "regs": both("registers", total="max"), "KB in flight": both("in_flight_KB", total="min"),
        "floor us": both("floor_bytes", floor(1)),
    }))  # fmt: skip


def measured(found: pd.DataFrame, direction: str) -> list[pd.DataFrame]:
    """Ours in microseconds with L2 cold and warm and as a share of the copy rate of the same run; how many
    times as long each of the others takes, L2 cold. More than one table if there are many others. The last
    row is of all layers: no figure where one of them has none."""
    mode = "graph" if direction == "both" else "eager"
    rows = select(found, status=MEASURED, direction=direction, mode=mode)
    cold, warm = rows[rows["cache"] == "cold"], rows[rows["cache"] == "warm"]
    if cold.empty:
        return []
    one = cold.drop_duplicates("case").set_index("case")
    count = one["count"].fillna(1)
    us = wide(cold, "us").join(wide(warm, "us").reindex(columns=["bnfast"]).add_suffix(" warm"))
    us.loc["all layers"] = us.mul(count, axis=0).sum(skipna=False)
    nothing = pd.Series(float("nan"), us.index)
    ours, again = us.get("bnfast", nothing), us["bnfast warm"]
    rate = wide(cold, "GBps").get("bnfast", nothing).reindex(us.index)
    left = pd.DataFrame({
        "C x size": [*one["label"], "all layers"], "layers": cells([*count, count.sum()], ".0f"),
        "us": cells(ours, ".1f"), "GB/s": cells(rate, ".0f"),
        "% of copy": cells(100 * rate / one["copy_GBps"].reindex(us.index), ".0f"),
        "warm us": cells(again, ".1f"),
    })  # fmt: skip
    names = [name for name in us if name not in ("bnfast", "bnfast warm")]
    others = pd.DataFrame({f"{name} x": cells(us[name] / ours, ".2f") for name in names})
    starts = range(0, max(1, len(others.columns)), BASELINES_A_TABLE)
    return [left.join(others.iloc[:, start : start + BASELINES_A_TABLE]) for start in starts]


def steps(found: pd.DataFrame) -> pd.DataFrame:
    """Training steps, those that were measured. Each is held against torch's and against the network without
    norms of its own stage, mode and size, which took turns with it."""
    found = found[found["status"] == MEASURED]
    us, bare = found["us"], found["norm"] == "none"
    stage = [found["shape"], found["suite"], found["mode"]]
    theirs = us.where((found["variant"] == "torch") & ~bare).groupby(stage).transform("first")
    kinds = [*stage, found["variant"].str.contains("compile")]
    without = us.where(bare).groupby(kinds).transform("first")
    return known(pd.DataFrame({
        "variant": [name + ", no norms" * none for name, none in zip(found["variant"], bare, strict=True)],
        "mode": [*found["mode"]], "ms": cells(us / 1e3, ".4g"),
        "quartiles": [f"{low:.4g}-{high:.4g}" for low, high in found[["us_low", "us_high"]].to_numpy() / 1e3],
        "of torch": cells(us / theirs, ".3f"), "norms": cells((1 - without / us).where(~bare), ".1%"),
        "peak MB": cells(found["peak_MB"], ".0f"), "apart": cells(found["loss_apart"], ".1e"),
        "allowed": cells(found["loss_allowed"], ".1e"),
    }))  # fmt: skip


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
    rows = select(found, status=MEASURED, cache="cold")
    groups = rows.groupby(["variant", "direction"])
    names = sorted(rows["variant"].unique(), key=lambda name: name != "bnfast")
    host, peak = groups["host_us"].median().unstack(), groups["peak_MB"].max().unstack()
    host, peak = (each.reindex(names, columns=[*DIRECTIONS, "both"]) for each in (host, peak))
    return pd.DataFrame({
        "": names, "host us, fwd": cells(host["forward"], ".1f"), "bwd": cells(host["backward"], ".1f"),
        "both in a graph": cells(host["both"], ".1f"), "peak MB, fwd": cells(peak["forward"], ".0f"),
        "bwd ": cells(peak["backward"], ".0f"),
    })  # fmt: skip


def plain(found: pd.DataFrame) -> pd.DataFrame:
    """A line a record, for what has no table of its own: bandwidths, probes, tile sweeps."""
    table = pd.DataFrame({
        "what": found["variant"], "size": found["shape"].where(found["shape"] != "", found["ran"]),
        "where": [" ".join(filter(None, row)) for row in found[["direction", "cache", "mode"]].to_numpy()],
        "us": cells(found["host_us"].fillna(found["us"]), ".1f"), "GB/s": cells(found["GBps"], ".0f"),
        "note": "",
    })  # fmt: skip
    # a note has what the others leave; the CSV file has all of it
    room = WIDTH - (max(map(len, as_text(table).splitlines())) if len(table) else 0)
    room = max(len("note"), room + len("note") - 1)
    notes = [note if len(note) <= room else note[: room - 3] + "..." for note in found["note"]]
    return table.assign(note=notes)
