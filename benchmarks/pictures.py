"""Pictures made of records alone (PNG files): anybody who has the CSV files can draw them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.records import MEASURED, PREDICTED
from benchmarks.tables import FLOOR_LABEL, floor, select, wide
from codegen.cases import DIRECTIONS


def pyplot() -> Any:
    import matplotlib  # it may not be installed

    matplotlib.use("Agg")  # a window is never wanted
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> bool:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
    return True


def timed(found: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Eager, L2 cold."""
    columns = {"cache": "cold", "mode": "eager", "direction": direction}
    return select(found, status=MEASURED, kind="layer", **columns)


def layers(path: Path, found: pd.DataFrame, title: str) -> None:
    """Forward and backward of each case: the floor, and a bar for each variant that was measured."""
    found = found[found["kind"] == "layer"]
    labels = select(found).drop_duplicates("case").set_index("case")["label"]
    figure, axes = pyplot().subplots(2, 1, figsize=(9, 2 + len(labels) / 1.5))
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        plans, times = select(found, status=PREDICTED, direction=direction), timed(found, direction)
        table = pd.DataFrame(index=labels.index)
        if len(plans):
            table[FLOOR_LABEL] = floor(plans.set_index("case")["floor_bytes"])
        if len(times):
            table = table.join(wide(times, "us").add_suffix(", measured"))
        options = {"title": direction, "xlabel": "microseconds a layer", "ylabel": "", "width": 0.8}
        table.rename(index=labels).plot.barh(ax=axis, **options)
        axis.invert_yaxis()
    figure.suptitle(title)
    save(figure, path)


def roofline(path: Path, found: pd.DataFrame) -> bool:
    """Rate against size, a dot for each measured case and variant, and the copy rate of the run."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 5), sharey=True)
    every = [timed(found, direction) for direction in DIRECTIONS]
    if all(rows.empty for rows in every):
        pyplot().close(figure)
        return False
    for axis, rows, direction in zip(axes, every, DIRECTIONS, strict=True):
        for variant, own in rows.groupby("variant", sort=False):
            axis.scatter(own["floor_bytes"] / 1e6, own["GBps"], s=18, label=variant)
        for rate in rows["copy_GBps"].dropna().unique():
            axis.axhline(rate, color="black", linewidth=1, linestyle="--")
        axis.set(title=f"{direction} (dashed: a copy in the same run)", xlabel="MB to move", xscale="log")
    axes[0].set(ylabel="GB/s of the bytes that the work must move")
    axes[0].legend()
    return save(figure, path)


def losses(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bool:
    """Both loss curves of the first entry (theirs, bnfast's), and below the difference in every entry."""
    figure, (above, below) = pyplot().subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    name, (theirs, ours) = next(iter(curves.items()))
    above.plot(theirs, color="tab:orange", linewidth=5, alpha=0.4, label=f"theirs, {name}")
    above.plot(ours, color="tab:blue", linewidth=1, label=f"bnfast, {name}")
    above.set(ylabel="training loss", title="Digits: the same network, trained twice")
    for name, (theirs, ours) in curves.items():
        apart = [abs(a - b) or float("nan") for a, b in zip(theirs, ours, strict=True)]
        label = name if any(each == each for each in apart) else f"{name}: none at any step"
        below.plot(apart, ".", markersize=3, label=label)
    below.set(xlabel="step", ylabel="|difference|", yscale="log", ylim=(1e-17, 1))
    above.legend()
    below.legend()
    return save(figure, path)
