"""The job `report`: tables and pictures made from earlier runs' CSV files and nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures, records, report, tables
from benchmarks.layers import show_kernels, show_measured, show_predicted
from benchmarks.records import OF_LAYERS, PREDICTED, Record


def load(paths: Sequence[Path]) -> list[Record]:
    """Of files, and of all CSV files of this schema in folders. ValueError if there is none."""
    found: list[Record] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        for file in sorted(path.rglob("*.csv")) if path.is_dir() else [path]:
            if path.is_dir() and not (file.is_file() and records.is_ours(file)):
                continue  # other tables lie beside them
            found += records.read(file)
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no benchmark's CSV file in there")
    return found


def origins(found: Sequence[Record]) -> list[str]:
    """Each machine, with versions and commit, that records come from."""
    lines = dict.fromkeys(
        f"{r.gpu or 'no GPU'}{', driver ' + r.driver if r.driver else ''}; {r.versions}; commit {r.commit}"
        for r in found
    )
    return list(lines)


def show(found: Sequence[Record], out: Path | None, lacking: Sequence[str]) -> None:
    for line in origins(found):
        report.paragraph(line)
    layers = [r for r in found if r.kind in OF_LAYERS]
    groups = dict.fromkeys((r.network, r.norm, r.dtype, r.layout) for r in layers)
    for network, norm, dtype, layout in groups:
        own = [r for r in layers if (r.network, r.norm, r.dtype, r.layout) == (network, norm, dtype, layout)]
        report.section(f"{network}: {norm}, {dtype}, {layout}")
        predictions = [r for r in own if r.status == PREDICTED]
        if predictions:
            show_predicted(predictions)
        if any(r.status != PREDICTED and r.kind == "layer" for r in own):
            show_measured([r for r in own if r.kind == "layer"])
        show_kernels(own)
    for kind in ("copy", "probe", "step", "sweep", "host"):
        rows = tables.plain([r for r in found if r.kind == kind])
        if rows:
            report.section({"copy": "Copy, read and write rates", "step": "Training steps"}.get(kind, kind))
            print(report.table(tables.PLAIN_HEADERS, rows))
    if out is not None and "matplotlib" not in lacking:
        draw(layers, out)


def draw(layers: Sequence[Record], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise report.Refused(
            f"argument --out: {out} is no folder and cannot be made one: {e.strerror}"
        ) from None
    drawn = figures.roofline(out / "roofline.png", layers)
    for direction in ("forward", "backward"):
        drawn |= figures.ratios(out / f"ratios-{direction}.png", layers, direction)
    drawn |= figures.total(out / "resnet50-total.png", layers, "ResNet-50")
    report.paragraph(
        f"Pictures are in {out}." if drawn else "Nothing was measured: there is nothing to draw."
    )


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    try:
        found = load(options.paths)
    except ValueError as e:
        raise report.Refused(f"argument PATH: {e}") from None
    first = options.paths[0]
    show(found, options.out or (first if first.is_dir() else first.parent), lacking)
    return 0
