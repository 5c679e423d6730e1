"""Pictures made of records alone (PNG files): anybody who has the CSV files can draw them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.records import MEASURED, PREDICTED
from benchmarks.tables import FLOOR_LABEL, floor, select, wide
from codegen.cases import DIRECTIONS


@contextmanager
def drawing(path: Path, rows: int, columns: int, **options: Any) -> Iterator[Any]:
    """The axes of a figure that opens no window, and is written when they are drawn."""
    import matplotlib  # it may not be installed

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, **options)
    yield axes
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def timed(found: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Eager, L2 cold."""
    return select(found, status=MEASURED, cache="cold", mode="eager", direction=direction)


def layers(path: Path, found: pd.DataFrame, title: str) -> None:
    """Forward and backward of each case: the floor, and a bar for each variant that was measured."""
    labels = select(found).drop_duplicates("case").set_index("case")["label"]
    with drawing(path, 2, 1, figsize=(9, 2 + len(labels) / 1.5)) as axes:
        for axis, direction in zip(axes, DIRECTIONS, strict=True):
            plans, times = select(found, status=PREDICTED, direction=direction), timed(found, direction)
            table = pd.DataFrame({FLOOR_LABEL: floor(plans.set_index("case")["floor_bytes"])}, labels.index)
            if len(times):
                table = table.join(wide(times, "us").add_suffix(", measured"))
            options = {"title": f"{title}, {direction}", "xlabel": "microseconds a layer", "ylabel": ""}
            table.rename(index=labels).plot.barh(ax=axis, width=0.8, **options)
            axis.invert_yaxis()


def roofline(path: Path, found: pd.DataFrame) -> None:
    """Rate against size, a dot for each measured case and variant, and the copy rate of the run; nothing
    where nothing was measured."""
    if all(timed(found, direction).empty for direction in DIRECTIONS):
        return
    with drawing(path, 1, 2, figsize=(11, 5), sharey=True) as axes:
        for axis, direction in zip(axes, DIRECTIONS, strict=True):
            rows = timed(found, direction)
            for variant, own in rows.groupby("variant", sort=False):
                axis.scatter(own["floor_bytes"] / 1e6, own["GBps"], s=18, label=variant)
            for rate in rows["copy_GBps"].dropna().unique():
                axis.axhline(rate, color="black", linewidth=1, linestyle="--")
            axis.set(title=f"{direction} (dashed: a copy in the same run)", xlabel="MB to move", xscale="log")
        axes[0].set(ylabel="GB/s of the bytes that the work must move")
        axes[0].legend()


def losses(path: Path, found: pd.DataFrame) -> None:
    """Both loss curves in the first dtype, and below the difference in each. found: columns dtype, step,
    torch.nn, bnfast, difference."""
    first = found[found["dtype"] == found["dtype"].iloc[0]]
    with drawing(path, 2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1)) as (above, below):
        above.plot(
            first["step"], first["torch.nn"], color="tab:orange", linewidth=5, alpha=0.4, label="torch.nn"
        )
        above.plot(first["step"], first["bnfast"], color="tab:blue", linewidth=1, label="bnfast")
        above.set(
            ylabel=f"training loss, {first['dtype'].iloc[0]}", title="Digits: one network, trained twice"
        )
        for dtype, own in found.groupby("dtype", sort=False):
            apart = own["difference"].abs().replace(0, float("nan"))
            label = f"{dtype}: none at any step" if apart.isna().all() else dtype
            below.plot(own["step"], apart, ".", markersize=3, label=label)
        below.set(xlabel="step", ylabel="|difference|", yscale="log", ylim=(1e-17, 1))
        above.legend()
        below.legend()
