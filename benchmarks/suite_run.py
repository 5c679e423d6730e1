"""The job `run`: all layers of a network, shape by shape; and the first look's parts about networks."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import measure, plots, report, suites, tables
from benchmarks.session import NAMES, Session, begin
from benchmarks.suites import SUITES, Network

ABOUT = (
    "T is the size of a layer's input. Bytes moved and kernels launched (runs) are counted, from the "
    "kernels' plan; a/b is forward/backward. The floor is the time those bytes take at "
    f"{tables.COPY_RATE / 1e12:.1f} TB/s, an assumption (the copy rate of an H200), not a measurement."
)
CsvLines = list[list[object]]


def layouts(network: Network, asked: str | None) -> tuple[str, ...]:
    """asked: one of suites.LAYOUTS, "both", or None for what the network usually runs in."""
    return suites.LAYOUTS if asked == "both" else (asked or network.layout,)


def dtypes(session: Session, network: Network) -> tuple[torch.dtype, ...]:
    """Most train in bf16, which torch computes in ATen; of the 16-bit types it gives only fp16 to cuDNN, and
    that only where it has a BatchNorm to compute."""
    both = session.gpu and network.norm == "BatchNorm"
    return (torch.bfloat16, torch.float16) if both else (torch.bfloat16,)


def measured(session: Session, network: Network, dtype: torch.dtype, layout: str) -> list[tables.Row]:
    """The rows of a network, on a GPU with times in them."""
    last = layout == "channels_last"
    if not session.gpu:
        return tables.rows(network, dtype.itemsize, last)
    sms = torch.cuda.get_device_properties(session.device).multi_processor_count
    rows = tables.rows(network, dtype.itemsize, last, sms)
    with report.progress(len(rows), f"timing {network.name}, {NAMES[dtype]}") as bar:
        found = []
        for row in rows:
            found.append(timed(row, network, dtype, last, session.device))
            bar.update(1)
    return found


def timed(
    row: tables.Row, network: Network, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> tables.Row:
    """The row with times in it; without, where the shape does not fit in the GPU's memory."""
    assert row.shape is not None
    shape = (network.batch, row.shape.channels, *row.shape.size)
    pair = measure.makers(network, row.shape, dtype, device)
    try:
        ours, theirs = measure.compare(*pair, shape, dtype, channels_last, device)
        row = dataclasses.replace(row, bnfast=ours, torch=theirs)
    except torch.OutOfMemoryError:
        report.paragraph(f"{row.label}: not measured, out of memory")
    torch.cuda.empty_cache()
    return row


def how_many(session: Session, rows: Sequence[tables.Row]) -> str:
    """What is said of measuring in the summary."""
    if not session.gpu:
        return "counted; measured times need a GPU"
    timed = sum(row.bnfast is not None for row in rows)
    return f"counted; {timed} of {len(rows)} shapes measured"


def lines(
    session: Session, network: Network, rows: Sequence[tables.Row], dtype: str, layout: str
) -> CsvLines:
    return [tables.csv_row(network, row, dtype, layout, session.absent) for row in rows]


def in_full(session: Session, network: Network, layout: str) -> tuple[CsvLines, list[tables.Row]]:
    """Prints and draws the table of a network. Returns its lines for a CSV file, and its rows."""
    kept: CsvLines = []
    every: list[tables.Row] = []
    for dtype in dtypes(session, network):
        rows = measured(session, network, dtype, layout)
        if session.gpu:
            own = NAMES[dtype] if network.norm == "GroupNorm" else "fp32"
            print(f"\n{NAMES[dtype]}, with {own} parameters")
        shown = [tables.cells(row, session.absent) for row in (*rows, tables.total(rows))]
        print(report.table(tables.headers("C x size"), shown), flush=True)
        if session.gpu:
            report.paragraph("GB/s, of the bytes counted above in both cases:")
            print(report.table(tables.SPEED_HEADERS, [tables.speed(row) for row in rows]))
        kept += lines(session, network, rows, NAMES[dtype], layout)
        every += rows
        picture = session.folder / f"{network.file}-{NAMES[dtype]}-{layout}.png"
        title = f"{network.title(layout)}, {NAMES[dtype]}"
        session.draw(partial(plots.layers, picture, rows, title))
    return kept, every


def compact(session: Session, asked: Sequence[str]) -> None:
    """Prints one line for each network of these suites, in the layout that it usually runs in."""
    every, shown = [], []
    for suite in asked:
        kept: CsvLines = []
        for network in SUITES[suite]:
            rows = measured(session, network, torch.bfloat16, network.layout)
            shown.append(tables.cells(tables.total(rows, network.name), session.absent))
            kept += lines(session, network, rows, "bf16", network.layout)
            every += rows
        report.write_csv(session.folder / f"{suite}.csv", tables.CSV_HEADERS, kept)
    print(report.table(tables.headers("network"), shown))
    session.note("networks", "DONE", how_many(session, every))


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Every network of the suites that were asked for, in every layout asked for."""
    session = begin(options, lacking, "bnfast: what the normalization layers of whole networks move and take")
    report.section("The tables", ABOUT)
    for suite in SUITES if options.suite == "all" else (options.suite,):
        kept: CsvLines = []
        every: list[tables.Row] = []
        for network in SUITES[suite]:
            for layout in layouts(network, options.layout):
                report.section(network.title(layout), f"Source: {network.source}.")
                found, rows = in_full(session, network, layout)
                kept, every = kept + found, every + rows
        report.write_csv(session.folder / f"{suite}.csv", tables.CSV_HEADERS, kept)
        session.note(suite, "DONE", how_many(session, every))
    return session.close()
