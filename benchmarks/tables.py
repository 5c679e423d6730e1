"""Records as tables: a row for each case, and one for all layers of the network. What was measured and what
was predicted are never in one table."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from textwrap import shorten

import pandas as pd

from benchmarks.model import COPY_RATE, floor
from benchmarks.records import CANNOT, MEASURED, PREDICTED
from codegen.cases import DIRECTIONS, DTYPES

FLOOR_LABEL = f"floor at {COPY_RATE / 1e12:.1f} TB/s, an assumption: the copy rate of an H200"
MODELLED = "modelled for an H200, with constants that were not measured"
WITH_LAUNCHES = "only launches are added to the floor, with a gap that was not measured"
NOTE = 40  # characters of a note
KEY = ["network", "norm", "groups", "shape", "dtype", "layout", "activation", "residual"]
NETWORK = ["network", "norm", "dtype", "layout"]
IDENTITY = ["status", "kind", *KEY, "variant", "direction", "cache", "mode"]


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


def predicted(found: pd.DataFrame) -> pd.DataFrame:
    """Planned and modelled, without a GPU; forward and backward as a/b. The last row is of all layers. Empty
    if nothing was predicted."""
    ours = select(found, status=PREDICTED, variant="bnfast")
    if ours.empty:
        return ours
    one = ours.drop_duplicates("case").set_index("case")
    count = one["count"].fillna(1)
    values = one["shape"].map(lambda shape: prod(map(int, shape.split("x"))))
    size = values * one["dtype"].map(lambda name: DTYPES[name].itemsize) / 1e6
    return pd.DataFrame({
        "C x size": [*one["label"], "all"], "layers": cells([*count, count.sum()], ".0f"),
        "T MB": cells([*size, (size * count).sum()], ".1f"),
        "MB moved": _both(ours, count, "floor_bytes", 1e-6), "launches": _both(ours, count, "launches"),
        "floor us": _both(ours, count, "floor_bytes", floor(1)),
        "modelled us": _both(ours, count, "us", 1.0),
    })  # fmt: skip


def counted(found: pd.DataFrame) -> pd.DataFrame:
    """Of the compiled kernels, as `predicted`. The last row has the most, but the least in flight, and the
    sectors and wavefronts of all layers. Empty if nothing was compiled."""
    ours = select(found, status=PREDICTED, variant="bnfast")
    ours = ours[ours["registers"].notna()]
    one = ours.drop_duplicates("case").set_index("case")
    count = one["count"].fillna(1)
    return pd.DataFrame({
        "C x size": [*one["label"], "all"],
        "regs": _both(ours, count, "registers", total="max"),
        "KB in flight": _both(ours, count, "in_flight_KB", total="min"),
        "instr": _both(ours, count, "instructions", total="max"),
        "sector MB": _both(ours, count, "sector_MB", 1.0),
        "kwavefr": _both(ours, count, "kwavefronts", 1.0),
        "barriers": _both(ours, count, "barriers", total="max"),
        "trips": _both(ours, count, "round_trips", total="max"),
    }).iloc[: None if len(one) else 0]  # fmt: skip


def _both(
    ours: pd.DataFrame, count: pd.Series, column: str, scale: float | None = None, total: str = "sum"
) -> list[str]:
    """A column's forward and backward as a/b, and that of all layers. scale: None for whole numbers."""
    values = wide(ours, column, "direction").reindex(columns=DIRECTIONS) * (scale or 1)
    added = values.mul(count, axis=0).sum()
    values.loc["all"] = added if total == "sum" else values.agg(total, skipna=False)
    show = short if scale else "{:.0f}".format
    return ["-" if row.isna().any() else "/".join(map(show, row)) for _, row in values.iterrows()]


def measured(found: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Ours in microseconds with L2 cold and warm and as a share of the copy rate of the same run; how many
    times as long each of the others takes, L2 cold. The last row is of all layers: no figure where one of
    them has none. Empty if nothing was measured."""
    mode = "graph" if direction == "both" else "eager"
    rows = select(found, status=MEASURED, direction=direction, mode=mode)
    cold, warm = rows[rows["cache"] == "cold"], rows[rows["cache"] == "warm"]
    if cold.empty:
        return cold
    one = cold.drop_duplicates("case").set_index("case")
    count = one["count"].fillna(1)
    others = [name for name in cold["variant"].unique() if name != "bnfast"]
    us = wide(cold, "us").reindex(columns=["bnfast", *others])
    us["warm"] = wide(warm, "us").reindex(columns=["bnfast"])["bnfast"]
    us.loc["all"] = us.mul(count, axis=0).sum(skipna=False)
    rate = wide(cold, "GBps").reindex(us.index, columns=["bnfast"])["bnfast"]
    return pd.DataFrame({
        "C x size": [*one["label"], "all layers"], "layers": cells([*count, count.sum()], ".0f"),
        "us": cells(us["bnfast"], ".1f"), "GB/s": cells(rate, ".0f"),
        "% of copy": cells(100 * rate / one["copy_GBps"].reindex(us.index), ".0f"),
        "warm us": cells(us["warm"], ".1f"),
        **{f"{name} x": cells(us[name] / us["bnfast"], ".2f") for name in others},
    })  # fmt: skip


def steps(found: pd.DataFrame) -> pd.DataFrame:
    """Training steps, those that were measured. Each is held against torch's of its own stage, mode and size,
    which took turns with it."""
    found = found[found["status"] == MEASURED]
    us, stage = found["us"], [found["shape"], found["suite"], found["mode"]]
    theirs = us.where(found["variant"] == "torch").groupby(stage).transform("first")
    return pd.DataFrame({
        "variant": [*found["variant"]], "mode": [*found["mode"]], "ms": cells(us / 1e3, ".4g"),
        "quartiles": [f"{low:.4g}-{high:.4g}" for low, high in found[["us_low", "us_high"]].to_numpy() / 1e3],
        "of torch": cells(us / theirs, ".3f"), "peak MB": cells(found["peak_MB"], ".0f"),
        "apart": cells(found["loss_apart"], ".1e"), "allowed": cells(found["loss_allowed"], ".1e"),
    })  # fmt: skip


def refusals(found: pd.DataFrame) -> list[str]:
    """Who could not run what, and why: a line for each reason."""
    times = found[found["status"] == CANNOT].groupby(["variant", "note"], sort=False).size()
    return [f"{variant}: {note} ({n} of them)" for (variant, note), n in times.items()]


def who_ran(found: pd.DataFrame) -> list[str]:
    """What each variant's name stands for, as it really ran."""
    ran = found[(found["status"] == MEASURED) & (found["kind"] == "layer") & (found["ran"] != "")]
    names = ran.groupby("variant", sort=False)["ran"].unique()
    return [f"{variant}: {', '.join(sorted(each))}" for variant, each in names.items()]


def plain(found: pd.DataFrame) -> pd.DataFrame:
    """A line a record, for what has no table of its own: bandwidths, probes, tile sweeps. Columns that say
    nothing are left out, and notes are cut; the CSV file has all of them."""
    table = found[["variant", "ran", "shape", "direction", "cache", "mode"]].assign(
        us=cells(found["us"], ".1f"), GBps=cells(found["GBps"], ".0f"),
        note=[shorten(note, NOTE, placeholder="...") for note in found["note"]],
    )  # fmt: skip
    return table.loc[:, ~table.isin(["", "-"]).all()]
