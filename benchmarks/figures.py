"""Pictures made of records alone: anybody who has the CSV file can draw them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.plots import pyplot, save
from benchmarks.records import MEASURED, PREDICTED, Record
from benchmarks.tables import FLOOR_LABEL, Selection, floor


def timed(records: Sequence[Record], **columns: str) -> Selection:
    """Eager, L2 cold, unless columns say otherwise."""
    found = Selection([r for r in records if r.status == MEASURED and r.kind == "layer"])
    return found.where(**{"cache": "cold", "mode": "eager", **columns})


def layers(path: Path, records: Sequence[Record], title: str) -> None:
    """Forward and backward of each case: the floor, and a bar for each variant that was measured."""
    plt = pyplot()
    keys = Selection(records).keys
    height = 2 + len(keys) / 3
    figure, axes = plt.subplots(1, 2, figsize=(11, height), sharey=True)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        floors = Selection([r for r in records if r.status == PREDICTED]).where(direction=direction)
        found = timed(records, direction=direction)
        bars: dict[str, list[float]] = {}
        if floors.records:
            bars[FLOOR_LABEL] = [
                floor(r.floor_bytes or 0) if (r := floors.one(k, "bnfast")) else 0 for k in keys
            ]
        for variant in found.variants:
            bars[f"{variant}, measured"] = [(r.us or 0) if (r := found.one(k, variant)) else 0 for k in keys]
        thick = 0.8 / max(1, len(bars))
        for number, (label, values) in enumerate(bars.items()):
            axis.barh([i + number * thick for i in range(len(keys))], values, thick, label=label)
        axis.set(title=direction, xlabel="microseconds a layer")
        axis.set_yticks([i + 0.4 - thick / 2 for i in range(len(keys))], [key.label for key in keys])
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3)
    save(figure, path, bottom=0.4 / height)


def roofline(path: Path, records: Sequence[Record]) -> bool:
    """Rate against size, a dot for each measured case and variant, and the copy rate of the run."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
    drawn = False
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        found = timed(records, direction=direction)
        for variant in found.variants:
            own = [r for r in found.records if r.variant == variant and r.GBps]
            sizes, rates = [r.x_bytes / 1e6 for r in own], [r.GBps for r in own]
            axis.scatter(sizes, rates, s=18, label=variant)
            drawn = drawn or bool(own)
        for rate in sorted({r.copy_GBps for r in found.records if r.copy_GBps}):
            axis.axhline(rate, color="black", linewidth=1, linestyle="--")
        axis.set(title=f"{direction} (dashed: a copy in the same run)", xlabel="T, MB", xscale="log")
    axes[0].set(ylabel="GB/s of the bytes that the work must move")
    if drawn:
        axes[0].legend()
        save(figure, path)
    else:
        plt.close(figure)
    return drawn


def ratios(path: Path, records: Sequence[Record], direction: str) -> bool:
    """How many times as long as bnfast each of the others takes, by case."""
    found = timed(records, direction=direction)
    others = [name for name in found.variants if name != "bnfast"]
    rows = [(key, ours) for key in found.keys if (ours := found.one(key, "bnfast")) and ours.us]
    if not rows or not others:
        return False
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 2 + len(rows) / 3))
    thick = 0.8 / len(others)
    for number, name in enumerate(others):
        values = [((r.us or 0) / (ours.us or 1)) if (r := found.one(key, name)) else 0 for key, ours in rows]
        axis.barh([i + number * thick for i in range(len(rows))], values, thick, label=name)
    axis.axvline(1, color="black", linewidth=1)
    labels = [f"{key.network}: {key.label} {key.dtype} {key.layout}" for key, _ in rows]
    axis.set_yticks([i + 0.4 - thick / 2 for i in range(len(rows))], labels, fontsize=7)
    axis.invert_yaxis()
    axis.set(title=f"{direction}, L2 cold", xlabel="time over bnfast's (right of 1: bnfast is faster)")
    axis.legend()
    save(figure, path)
    return True


def total(path: Path, records: Sequence[Record], network: str) -> bool:
    """Milliseconds of all layers of a network, a bar for each variant that ran all of them."""
    bars: dict[str, tuple[float, float]] = {}
    for dtype, layout in dict.fromkeys((r.dtype, r.layout) for r in records if r.network == network):
        columns = {"network": network, "dtype": dtype, "layout": layout}
        ways = [timed(records, direction=way, **columns) for way in ("forward", "backward")]
        for variant in ways[0].variants:
            forward, backward = (way.total(variant) for way in ways)
            if forward and backward:
                bars[f"{variant}, {dtype}, {layout}"] = forward / 1e3, backward / 1e3
    if not bars:
        return False
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 2 + len(bars) / 3))
    forwards, backwards = zip(*bars.values(), strict=True)
    axis.barh(list(bars), forwards, label="forward")
    axis.barh(list(bars), backwards, left=forwards, label="backward")
    axis.invert_yaxis()
    axis.set(title=f"All normalization layers of {network}", xlabel="milliseconds, L2 cold")
    axis.legend()
    save(figure, path)
    return True
