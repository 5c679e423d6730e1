"""The pictures of a run, drawn by matplotlib into PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import tables


def losses(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], labels: tuple[str, str]
) -> None:
    """Both loss curves of the first entry (theirs, bnfast's), and below the difference in every entry."""
    plt = _pyplot()
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    name, (theirs, ours) = next(iter(curves.items()))
    above.plot(theirs, color="tab:orange", linewidth=5, alpha=0.4, label=f"{labels[0]}, {name}")
    above.plot(ours, color="tab:blue", linewidth=1, label=f"{labels[1]}, {name}")
    above.set(ylabel="training loss", title="Digits: the same network, trained twice")
    above.legend()
    for name, (theirs, ours) in curves.items():
        apart = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
        label = name if any(apart) else f"{name}: none at any step"
        below.plot([value or float("nan") for value in apart], ".", markersize=3, label=label)
    below.set(xlabel="step", ylabel="|difference|", yscale="log", ylim=(1e-17, 1))
    below.legend()
    _save(figure, path)


def layers(path: Path, rows: Sequence[tables.Row], title: str) -> None:
    """Forward and backward of each shape, a bar for each thing known: the floor, and what was measured."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 2 + len(rows) / 4), sharex=True, sharey=True)
    labels = [f"{row.label}  ({row.count})" for row in rows]
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        bars = {tables.FLOOR_LABEL: [tables.floor(getattr(row, f"{direction}_bytes")) for row in rows]}
        if all(row.bnfast and row.torch for row in rows):
            bars["bnfast, measured"] = [getattr(row.bnfast, direction) for row in rows]
            bars["torch, measured"] = [getattr(row.torch, direction) for row in rows]
        thick = 0.8 / len(bars)
        for number, (label, values) in enumerate(bars.items()):
            axis.barh([i + number * thick for i in range(len(rows))], values, thick, label=label)
        axis.set(title=direction, xlabel="microseconds a layer")
        axis.set_yticks([i + 0.4 - thick / 2 for i in range(len(rows))], labels)
    axes[0].invert_yaxis()
    figure.suptitle(f"{title}; in brackets: how many layers of that shape")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3)
    _save(figure, path, bottom=0.3 / (2 + len(rows) / 4))


def _pyplot():  # type: ignore[no-untyped-def]  # a module, and only where matplotlib is installed
    import matplotlib

    matplotlib.use("Agg")  # a window is never wanted
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path, bottom: float = 0.0) -> None:  # type: ignore[no-untyped-def]
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
