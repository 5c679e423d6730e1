"""The job `gpu`: everything that a GPU is needed for, in one command of at most nine minutes.

The most valuable parts come first, each has its share of the time and writes its records to disk as they are
made; a part that fails, or that has no time left, does not stop the next."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases, measure, model_step, records, report, show, stamp, suites, tile_sweep
from benchmarks.baselines import cudnn_graphs
from benchmarks.baselines.contender import lacks
from benchmarks.layers import Run
from benchmarks.machine import bandwidth, clocks, l2, launch
from benchmarks.model_variants import Task
from benchmarks.records import Record
from benchmarks.session import Session, begin
from benchmarks.suites import Network

LIMIT = 540.0  # seconds, of which the summary needs a few
# What compute-sanitizer runs, many times slower: whole channels_last rows, planes, and a row a channel.
SANITIZED = (
    "-m", "gpu", "tests/gpu/test_parity.py",
    "-k", "forms and bfloat16 and (9x24x50 or 6x24x14x14 or 200x24)",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


class NotHere(Exception):
    """What a part needs is not on this machine."""


@dataclass(frozen=True)
class Part:
    """work: makes records until its seconds are over; it is stopped between two records. seconds: its share,
    of which what it leaves goes to the others."""

    name: str
    seconds: float
    work: Callable[[Session, float], Iterator[Record]]


def of_suite(
    network: Network, suite: str, layouts: Sequence[str], dtypes: Sequence[torch.dtype], names: Sequence[str],
    method: measure.Method,
) -> Callable[[Session, float], Iterator[Record]]:  # fmt: skip
    def work(session: Session, seconds: float) -> Iterator[Record]:
        run = Run(session, method, names, None)  # run_part writes what this makes
        for dtype in dtypes:
            for layout in layouts:
                for case in cases.of_network(suite, network, dtype, layout == "channels_last"):
                    yield from run.case(case)

    return work


def process(session: Session, name: str, command: Sequence[str], seconds: float) -> Record:
    """A command of its own, whose output goes to a file; a record of how it ended."""
    path = session.folder / f"{name}.log"
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    start = time.monotonic()
    with path.open("w", encoding="utf-8") as file:
        try:
            code = str(
                subprocess.run(
                    command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
                ).returncode
            )
        except subprocess.TimeoutExpired:
            code = "none: out of time"
    last = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    took = time.monotonic() - start
    ended = f"exit code {code}; {last[-1] if last else 'no output'}"
    return Record(kind="probe", status=records.MEASURED, variant=name, us=round(took * 1e6), note=ended[:300])


def correctness(session: Session, seconds: float) -> Iterator[Record]:
    xml = session.folder.absolute() / "correctness.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/gpu",
        "--maxfail=50",
        f"--junitxml={xml}",
    ]
    yield process(session, "correctness", command, seconds)


def machine(session: Session, seconds: float) -> Iterator[Record]:
    yield from clocks.clocks(session.device)
    yield from bandwidth.bandwidth(session.device, seconds)


def latencies(session: Session, seconds: float) -> Iterator[Record]:
    yield from l2.l2_reuse(session.device, seconds / 2)
    yield from launch.launches(session.device, seconds / 4)
    yield from launch.grid_barriers(session.device, seconds / 4)


def steps(session: Session, seconds: float) -> Iterator[Record]:
    yield from model_step.measure_steps(Task(session.device), budget=seconds)


def tiles(session: Session, seconds: float) -> Iterator[Record]:
    yield from tile_sweep.sweep(session.device)


def cudnn_frontend(session: Session, seconds: float) -> Iterator[Record]:
    why = lacks(cudnn_graphs.PACKAGE)
    if why is not None:
        raise NotHere(why)
    last = suites.LAYOUTS[::-1][:1]
    yield from of_suite(suites.RESNET50, "resnet50", last, BOTH, ("cudnn-frontend",), SHORT)(session, seconds)


def kernels(session: Session, seconds: float) -> Iterator[Record]:
    """Of ResNet-50's layers as most train it."""
    run = Run(session, SHORT, EAGER, None)
    for case in cases.of_network("resnet50", suites.RESNET50, torch.bfloat16, channels_last=True):
        yield from run.kernels(case)


def sanitizer(session: Session, seconds: float) -> Iterator[Record]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise NotHere("compute-sanitizer is not on this machine")
    for tool in ("memcheck", "racecheck"):
        command = [
            program,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
        ]
        yield process(session, f"sanitizer-{tool}", [*command, *SANITIZED], seconds / 2)


BOTH = (torch.bfloat16, torch.float16)
SHORT = measure.Method(rounds=9)
COMPILED = measure.Method(rounds=9, caches=("cold",), graph=False, verify=False)
EAGER = ("torch", "native", "cudnn-op")
PARTS = (
    Part("correctness", 130, correctness),
    Part("machine", 25, machine),
    Part("resnet50", 115, of_suite(suites.RESNET50, "resnet50", suites.LAYOUTS[::-1], BOTH, EAGER, SHORT)),
    Part("groupnorm", 50, of_suite(
        suites.SD15_UNET, "sd-unet", suites.LAYOUTS, BOTH[:1], ("torch", "apex", "liger"), SHORT)),
    Part("step", 80, steps),
    Part("compiled", 45, of_suite(
        suites.RESNET50, "resnet50", ("channels_last",), BOTH[:1], ("compile", "compile-max"), COMPILED)),
    Part("cudnn-frontend", 20, cudnn_frontend),
    Part("latencies", 20, latencies),
    Part("tiles", 25, tiles),
    Part("kernels", 10, kernels),  # after all that is timed: see kernels_run.py
    Part("sanitizer", 20, sanitizer),
)  # fmt: skip


def limited(found: Iterable[Record], end: float) -> Iterator[Record]:
    for record in found:
        yield record
        if time.monotonic() > end:
            raise TimeoutError("its time was over")


def run_part(session: Session, part: Part, end: float) -> None:
    """Its records go to NAME.csv, its fate to the summary."""
    path, start, count = session.folder / f"{part.name}.csv", time.monotonic(), 0
    state, text = "DONE", ""
    shared = stamp.columns(session.device)
    try:
        seconds = min(part.seconds, end - start)
        if seconds < 3:
            raise TimeoutError("no time was left")
        for record in limited(part.work(session, seconds), start + seconds):
            stamped = record if record.gpu else dataclasses.replace(record, **shared)
            records.append(path, [stamped])
            count += 1
    except TimeoutError as e:
        state, text = "PART", str(e)
    except NotHere as e:
        state, text = "NOT RUN", str(e)
    except Exception as e:
        state, text = "FAIL", measure.one_line(e)
    took = time.monotonic() - start
    session.note(part.name, state, f"{count} records in {took:.0f} s{'; ' + text if text else ''}")


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """All parts, or those asked for; then tables of all that was measured."""
    session = begin(options, lacking, "bnfast: everything that a GPU is needed for")
    if not session.gpu:
        session.note(
            "gpu", "NOT RUN", "needs a GPU; `python3 -m benchmarks run --suite all` predicts without one"
        )
        session.close()
        return 1
    end = session.start + options.limit
    parts = [part for part in PARTS if not options.part or part.name in options.part]
    with report.progress(len(parts), "parts") as bar:
        for part in parts:
            run_part(session, part, end)
            bar.update(1)
    try:
        found = show.load([session.folder])
    except ValueError:
        found = []
    show.show(found, session.folder, lacking)
    for line in tile_sweep.beaten(found):
        report.paragraph(f"A better tile: {line}")
    return session.close()
