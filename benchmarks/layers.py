"""The job `run`: every normalization layer of some networks, predicted anywhere and timed on a GPU."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import measure, pictures, predict, records, stamp, suites, tables
from benchmarks.cases import columns, of_network
from benchmarks.model import COPY_RATE
from benchmarks.records import CANNOT, MEASURED, Record, frame
from benchmarks.report import CODE, show_layers
from benchmarks.session import Session, begin, paragraph, progress, section
from benchmarks.suites import SUITES, Network
from benchmarks.timing import one_line
from codegen.cases import DIRECTIONS, DTYPES, NAMES, Case

COUNTED = (
    "T is the size of a layer's input; a/b is forward/backward. PREDICTED: bytes moved and kernels launched "
    "are counted from the kernels' plan, and the floor is the time those bytes take at "
    f"{COPY_RATE / 1e12:.1f} TB/s, an assumption (an H200's copy rate). The modelled time adds launches, "
    "shared memory and what the last program does alone (benchmarks/model.py). Nothing of it is measured."
)
HOW = (
    "MEASURED with CUDA events, providers in turns on the same random tensors; the median of the readings. "
    "us: bnfast with L2 cold; warm: the same tensor again and again; GB/s: the bytes that the work must move "
    "in that time; % of copy: that rate against a copy's in the same run; x: how many times as long somebody "
    "else takes, L2 cold."
)
ASKED = {"fwd": ("forward",), "bwd": ("backward",), "both": DIRECTIONS}
QUICK = measure.Method(rounds=5, caches=("cold",), graph=False)
Choice = tuple[str, Network, torch.dtype, str]  # suite, network, dtype, layout


def layouts(network: Network, asked: str | None) -> tuple[str, ...]:
    """asked: one of suites.LAYOUTS, "both", or None for what the network usually runs in."""
    return suites.LAYOUTS if asked == "both" else (asked or network.layout,)


class Run:
    """Timing of bnfast and these baselines with one stamp and one copy rate. file: where every record goes as
    it is measured; None if the caller sees to that."""

    def __init__(
        self, session: Session, method: measure.Method, names: Sequence[str], file: Path | None
    ) -> None:
        from benchmarks import machine  # needs Triton

        self.session, self.method, self.file = session, method, file
        self.baselines = measure.get(["bnfast", *names])
        self.shared: dict[str, Any] = stamp.columns(session.device)
        self.shared["copy_GBps"] = round(machine.copy_rate(list(machine.copies(session.device))), 1)

    def case(self, case: Case) -> Iterator[Record]:
        """One that cannot be set up, for memory say, is a record that says so. The clock and temperature of a
        case are those after its first figure, when the GPU is at work."""
        own = dict(self.shared)
        try:
            for record in measure.of_case(case, self.baselines, self.session.device, self.method):
                if record.status == MEASURED and own == self.shared:
                    own |= {"clock_MHz": None, "temperature_C": None, **stamp.clocks(self.session.device)}
                yield self.kept(dataclasses.replace(record, **own))
        except RuntimeError as e:
            why = one_line(e)
            yield self.kept(Record(**columns(case), status=CANNOT, variant="all", note=why, **self.shared))
        torch.cuda.empty_cache()

    def kept(self, record: Record) -> Record:
        if self.file is not None:
            records.append(self.file, [record])
        return record


def explained(session: Session) -> str:
    """What the tables' columns are."""
    return " ".join([COUNTED, CODE, *([HOW] if session.gpu else [])])


def of_choice(session: Session, run: Run | None, choice: Choice) -> pd.DataFrame:
    """All tables of a network, a file of its records, a picture. run: None if nothing is to be timed.
    Ctrl-C loses nothing: it is on disk already, and is shown first."""
    suite, network, dtype, layout = choice
    layers = f"{len(network.layers)} {network.norm} layers, batch {network.batch}"
    section(f"{network.name}: {layers}, {NAMES[dtype]}, {layout}", f"Source: {network.source}.")
    todo = of_network(suite, network, dtype, layout == "channels_last")
    shared = stamp.columns(session.device)
    found = [dataclasses.replace(r, **shared) for r in predict.records(todo)]
    records.append(session.folder / "predicted.csv", found)
    try:
        if run:
            for case in progress(todo, desc=f"timing {network.name}"):
                found += run.case(case)
    except KeyboardInterrupt:
        paragraph("Stopped. What was measured until then is in layers.csv.")
        raise
    finally:
        show_layers(frame(found))
    session.draw(lambda: pictures.layers(session.folder, frame(found)))
    return frame(found)


def summary(session: Session, found: pd.DataFrame) -> str:
    if not session.gpu:
        return "predicted; times need a GPU"
    of_layers = tables.select(found)
    timed = of_layers[of_layers["status"] == MEASURED]["case"]
    return f"{timed.nunique()} of {of_layers['case'].nunique()} cases measured"


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Every network of the suites that were asked for, in every layout and dtype asked for."""
    session = begin(options, lacking, "bnfast: what the normalization layers of whole networks move and take")
    section("The tables", explained(session))
    timing = None
    if session.gpu:
        method = QUICK if options.quick else measure.Method()
        method = dataclasses.replace(method, directions=ASKED[options.direction])
        timing = Run(session, method, options.baseline, session.folder / "layers.csv")
        for each in timing.baselines:
            paragraph(f"{each.name}: {each.about}")
    # most train in bf16, which torch computes in ATen; of the 16-bit types it gives only fp16 to cuDNN
    usual = {"BatchNorm": ["bf16", "fp16"]} if session.gpu else {}
    for suite in SUITES if options.suite == "all" else (options.suite,):
        found = pd.concat(
            of_choice(session, timing, (suite, network, DTYPES[name], layout))
            for network in SUITES[suite]
            for layout in layouts(network, options.layout)
            for name in options.dtype or usual.get(network.norm, ["bf16"])
        )
        session.note(suite, "DONE", summary(session, found))
    return session.close()
