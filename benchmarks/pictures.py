"""Pictures made of records alone (PNG files): anybody who has the CSV files can draw them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.model import floor
from benchmarks.records import MEASURED, PREDICTED
from benchmarks.tables import FLOOR_LABEL, MODELLED, NETWORK, select, wide
from codegen.cases import DIRECTIONS


@contextmanager
def drawing(path: Path, rows: int = 2, columns: int = 1, **options: Any) -> Iterator[Any]:
    """The axes of a figure that opens no window, and is written when they are drawn."""
    import matplotlib  # it may not be installed

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, **options)
    yield axes
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def layers(folder: Path, found: pd.DataFrame) -> None:
    """A file for each network: forward and backward of each case, the floor and a bar for each variant that
    was measured."""
    for names, own in found.groupby(NETWORK, sort=False):
        labels = select(own).drop_duplicates("case").set_index("case")["label"]
        path = folder / f"{'-'.join(names).replace(' ', '-')}.png"
        with drawing(path, figsize=(9, 2 + len(labels) / 1.5)) as axes:
            for axis, direction in zip(axes, DIRECTIONS, strict=True):
                plans = select(own, status=PREDICTED, direction=direction).set_index("case")
                times = {FLOOR_LABEL: floor(plans["floor_bytes"]), MODELLED: plans["us"]}
                table = pd.DataFrame(times, labels.index)
                times = select(own, status=MEASURED, cache="cold", mode="eager", direction=direction)
                if len(times):
                    table = table.join(wide(times, "us").add_suffix(", measured"))
                options = {"title": f"{', '.join(names)}, {direction}", "xlabel": "microseconds a layer"}
                table.rename(index=labels).plot.barh(ax=axis, width=0.8, ylabel="", **options)
                axis.invert_yaxis()


def roofline(path: Path, found: pd.DataFrame) -> None:
    """Rate against size, a dot for each case and variant that was measured, and the copy rate of the run."""
    times = select(found, status=MEASURED, cache="cold", mode="eager")
    if times.empty:
        return
    with drawing(path, 1, 2, figsize=(11, 5), sharey=True) as axes:
        for axis, direction in zip(axes, DIRECTIONS, strict=True):
            rows = select(times, direction=direction)
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
    with drawing(path, figsize=(8, 6), sharex=True, height_ratios=(2, 1)) as (above, below):
        above.plot(first["step"], first["torch.nn"], "tab:orange", linewidth=5, alpha=0.4, label="torch.nn")
        above.plot(first["step"], first["bnfast"], "tab:blue", linewidth=1, label="bnfast")
        title, loss = "Digits: one network, trained twice", f"training loss, {first['dtype'].iloc[0]}"
        above.set(title=title, ylabel=loss)
        for dtype, own in found.groupby("dtype", sort=False):
            apart = own["difference"].abs().replace(0, float("nan"))
            label = f"{dtype}: none at any step" if apart.isna().all() else dtype
            below.plot(own["step"], apart, ".", markersize=3, label=label)
        below.set(xlabel="step", ylabel="|difference|", yscale="log", ylim=(1e-17, 1))
        above.legend()
        below.legend()
