"""The job `run`: every normalization layer of some networks, predicted anywhere and timed on a GPU."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    baselines,
    cases,
    cost_tables,
    figures,
    kernels_run,
    measure,
    predict,
    records,
    report,
    stamp,
    suites,
    tables,
)
from benchmarks.machine import bandwidth, clocks
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.session import Session, begin
from benchmarks.suites import SUITES, Network
from codegen.cases import DIRECTIONS, DTYPES, NAMES, Case

COUNTED = (
    "T is the size of a layer's input; a/b is forward/backward. PREDICTED: bytes moved and kernels launched "
    "(runs) are counted from the kernels' plan, and the floor is the time those bytes take at "
    f"{tables.COPY_RATE / 1e12:.1f} TB/s, an assumption (an H200's copy rate). Nothing of it is measured."
)
CODE = (
    "Registers of a thread (regs) and the bytes that an SM has in flight are read from the kernels' machine "
    "code for an H100 or H200."
)
HOW = (
    "MEASURED with CUDA events, contenders in turns on the same random tensors; the median of the readings. "
    "us: bnfast with L2 cold; warm: the same tensor again and again; GB/s: the bytes that the work must move "
    "in that time; % of copy: that rate against a copy's in the same run; x: how many times as long somebody "
    "else takes, L2 cold."
)
ASKED = {"fwd": ("forward",), "bwd": ("backward",), "both": DIRECTIONS}
Choice = tuple[Network, torch.dtype, str]  # with its layout
QUICK = measure.Method(rounds=5, caches=("cold",), graph=False)


def layouts(network: Network, asked: str | None) -> tuple[str, ...]:
    """asked: one of suites.LAYOUTS, "both", or None for what the network usually runs in."""
    return suites.LAYOUTS if asked == "both" else (asked or network.layout,)


def dtypes(network: Network, asked: Sequence[str] | None, gpu: bool) -> list[torch.dtype]:
    """Most train in bf16, which torch computes in ATen; of the 16-bit types it gives only fp16 to cuDNN, and
    that only where it has a BatchNorm to compute."""
    usual = ["bf16", "fp16"] if gpu and network.norm == "BatchNorm" else ["bf16"]
    return [DTYPES[name] for name in asked or usual]


class Run:
    """Timing with one stamp and one copy rate. file: where every record goes as it is measured; None if the
    caller sees to that."""

    def __init__(
        self, session: Session, method: measure.Method, names: Sequence[str], file: Path | None
    ) -> None:
        self.session, self.method, self.file = session, method, file
        self.baselines = baselines.get(["bnfast", *(name for name in names if name != "bnfast")])
        self.shared: dict[str, Any] = stamp.columns(session.device)
        if session.gpu:
            self.shared["copy_GBps"] = round(bandwidth.copy_rate(session.device) / 1e9, 1)

    def case(self, case: Case) -> Iterator[Record]:
        """One that cannot be set up, for memory say, is a record that says so. The clock and temperature of a
        case are those after its first figure, when the GPU is at work."""
        own = dict(self.shared)
        try:
            for record in measure.of_case(case, self.baselines, self.session.device, self.method):
                if self.session.gpu and record.status == MEASURED and "clock_MHz" not in own:
                    now = clocks.read(self.session.device)
                    own |= {"clock_MHz": now.sm_MHz, "temperature_C": now.temperature_C}
                yield self.kept(dataclasses.replace(record, **own))
        except (torch.OutOfMemoryError, RuntimeError) as e:
            why = measure.one_line(e)
            yield self.kept(Record(**case.columns, status=CANNOT, variant="all", note=why, **self.shared))
        if self.session.gpu:
            torch.cuda.empty_cache()

    def kernels(self, case: Case) -> Iterator[Record]:
        """By name, of everybody who runs the case. Nothing should be timed after it: see kernels_run.py."""
        for record in kernels_run.of_case(case, self.baselines, self.session.device):
            yield self.kept(dataclasses.replace(record, **self.shared))

    def kept(self, record: Record) -> Record:
        if self.file is not None:
            records.append(self.file, [record])
        return record


def show_predicted(found: Sequence[Record]) -> None:
    headers, rows = tables.predicted(found)
    print("\nPREDICTED, not measured")
    print(report.table(headers, rows), flush=True)


def show_kernels(found: Sequence[Record]) -> None:
    headers, rows = cost_tables.kernels(found)
    if rows:
        print("\nKERNELS, copies and fills of a call, forward+backward; counted by torch's profiler")
        print(report.table(headers, rows), flush=True)
    for line in cost_tables.names(found):
        report.paragraph(line)


def show_measured(found: Sequence[Record]) -> None:
    for direction in (*DIRECTIONS, "both"):
        title = {"both": "forward and backward in a CUDA graph"}.get(direction, direction)
        for headers, rows in tables.measured(found, direction):
            if rows:
                print(f"\nMEASURED, {title}")
                print(report.table(headers, rows), flush=True)
    headers, rows = cost_tables.besides(found)
    if rows:
        print("\nMEASURED, besides the GPU's time")
        print(report.table(headers, rows), flush=True)
    for line in (*tables.who_ran(found), *tables.refusals(found)):
        report.paragraph(line)


def of_network(
    session: Session, run: Run | None, suite: str, network: Network, dtype: torch.dtype, layout: str,
    compiled: bool = True,
) -> list[Record]:  # fmt: skip
    """Both tables of a network, a file of its records, a picture. run: None if nothing is to be timed.
    compiled: as in predict.records."""
    todo = cases.of_network(suite, network, dtype, layout == "channels_last")
    title = network.title(layout, NAMES[dtype])
    report.section(title, f"Source: {network.source}.")
    found = [dataclasses.replace(r, **stamp.columns(session.device)) for r in predict.records(todo, compiled)]
    records.append(session.folder / "predicted.csv", found)
    show_predicted(found)
    if run:
        timed: list[Record] = []
        with report.progress(len(todo), f"timing {network.name}") as bar, kept_on_interrupt(timed):
            for case in todo:
                for record in run.case(case):
                    timed.append(record)
                bar.update(1)
        show_measured(timed)
        found += timed
    name = f"{network.file}-{NAMES[dtype]}-{layout}.png"
    session.draw(partial(figures.layers, session.folder / name, found, title))
    return found


@contextmanager
def kept_on_interrupt(found: Sequence[Record]) -> Iterator[None]:
    """Ctrl-C loses nothing: it is on disk already, and is shown before the run ends."""
    try:
        yield
    except KeyboardInterrupt:
        show_measured(found)
        report.paragraph("Stopped. What was measured until then is in layers.csv.")
        raise


def method(options: argparse.Namespace) -> measure.Method:
    base = QUICK if options.quick else measure.Method()
    return dataclasses.replace(base, directions=ASKED[options.direction])


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Every network of the suites that were asked for, in every layout and dtype asked for."""
    session = begin(options, lacking, "bnfast: what the normalization layers of whole networks move and take")
    report.section("The tables", " ".join([COUNTED, CODE, *([HOW] if session.gpu else [])]))
    timing = None
    if session.gpu:
        timing = Run(session, method(options), options.baseline, session.folder / "layers.csv")
        for each in timing.baselines:
            report.paragraph(f"{each.name}: {each.about}")
    elif options.kernels:
        report.paragraph("--kernels needs a GPU: none are named here.")
    suites_asked = SUITES if options.suite == "all" else (options.suite,)
    chosen = {suite: list(choices(suite, options, session.gpu)) for suite in suites_asked}
    for suite, networks in chosen.items():
        found = [r for choice in networks for r in of_network(session, timing, suite, *choice)]
        session.note(suite, "DONE", summary(session, found))
    if timing and options.kernels:
        for suite, networks in chosen.items():
            for choice in networks:
                name_kernels(timing, suite, *choice)
    return session.close()


def choices(suite: str, options: argparse.Namespace, gpu: bool) -> Iterator[Choice]:
    for network in SUITES[suite]:
        for layout in layouts(network, options.layout):
            for dtype in dtypes(network, options.dtype, gpu):
                yield network, dtype, layout


def name_kernels(run: Run, suite: str, network: Network, dtype: torch.dtype, layout: str) -> None:
    """Of a network's layers; and how many, beside how many were predicted."""
    todo = cases.of_network(suite, network, dtype, layout == "channels_last")
    found = list(predict.records(todo, compiled=False))
    with report.progress(len(todo), f"naming kernels, {network.name}") as bar:
        for case in todo:
            found += run.kernels(case)
            bar.update(1)
    report.section(f"{network.title(layout, NAMES[dtype])}: kernels")
    show_kernels(found)


def summary(session: Session, found: Sequence[Record]) -> str:
    if not session.gpu:
        return "predicted; times need a GPU"
    timed = {tables.Key.of(r) for r in found if r.status == MEASURED}
    every = {tables.Key.of(r) for r in found}
    return f"{len(timed)} of {len(every)} cases measured"
