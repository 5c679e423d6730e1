"""How pictures are drawn (matplotlib, PNG files), and the one of training. figures.py has the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def losses(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], labels: tuple[str, str]
) -> None:
    """Both loss curves of the first entry (theirs, bnfast's), and below the difference in every entry."""
    plt = pyplot()
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
    save(figure, path)


def pyplot():  # type: ignore[no-untyped-def]  # a module, and only where matplotlib is installed
    import matplotlib

    matplotlib.use("Agg")  # a window is never wanted
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path, bottom: float = 0.0) -> None:  # type: ignore[no-untyped-def]
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
