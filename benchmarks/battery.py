"""The job `gpu`: what a GPU is needed for, as much as nine minutes allow, in one command.

The most valuable parts come first; each has its share of the time and writes its records to disk as they are
made; a part that fails, or that has no time left, does not stop the next."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import cases, measure, model_step, predict, records, report, show, stamp, suites, tile_sweep
from benchmarks.baselines import cudnn_graphs
from benchmarks.baselines.contender import lacks
from benchmarks.layers import Run
from benchmarks.machine import bandwidth, clocks, l2, launch
from benchmarks.model_variants import Task
from benchmarks.processes import FEWEST_SECONDS, LAST_WORDS, NotHere, correctness, process, sanitizer
from benchmarks.records import Record
from benchmarks.session import Session, begin
from benchmarks.suites import Network

SUMMARY = 15.0  # seconds, for what comes before and after the parts


@dataclass(frozen=True)
class Part:
    """work: makes records, and keeps to the seconds that it is given: what it yields is kept however late.
    TimeoutError: it was not done. seconds: its share, as large as the others' are; what it leaves goes to
    those after it."""

    name: str
    seconds: float
    work: Callable[[Session, float], Iterator[Record]]


def limited(found: Iterable[Record], seconds: float) -> Iterator[Record]:
    """For work that knows of no end itself."""
    end = time.monotonic() + seconds
    for record in found:
        yield record
        if time.monotonic() > end:
            raise TimeoutError("its time was over")


def of_suite(
    network: Network, suite: str, layouts: Sequence[str], dtypes: Sequence[torch.dtype], names: Sequence[str],
    method: measure.Method,
) -> Callable[[Session, float], Iterator[Record]]:  # fmt: skip
    """What is predicted of the layers, then what is measured."""

    def work(session: Session, seconds: float) -> Iterator[Record]:
        ways = [(dtype, layout == "channels_last") for layout in layouts for dtype in dtypes]
        todo = [case for way in ways for case in cases.of_network(suite, network, *way)]
        yield from predict.records(todo, compiled=False)
        run = Run(session, method, names, None)  # run_part writes what this makes
        yield from limited((record for case in todo for record in run.case(case)), seconds)

    return work


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
    yield from limited(tile_sweep.sweep(session.device), seconds)


def cudnn_frontend(session: Session, seconds: float) -> Iterator[Record]:
    why = lacks(cudnn_graphs.PACKAGE)
    if why is not None:
        raise NotHere(why)
    last = suites.LAYOUTS[::-1][:1]
    yield from of_suite(suites.RESNET50, "resnet50", last, BOTH, ("cudnn-frontend",), SHORT)(session, seconds)


def kernels(session: Session, seconds: float) -> Iterator[Record]:
    """Of ResNet-50's layers as most train it."""
    run = Run(session, SHORT, EAGER, None)
    todo = cases.of_network("resnet50", suites.RESNET50, torch.bfloat16, channels_last=True)
    yield from predict.records(todo, compiled=False)
    yield from limited((record for case in todo for record in run.kernels(case)), seconds)


BOTH = (torch.bfloat16, torch.float16)
SHORT = measure.Method(rounds=7)
COMPILED = measure.Method(rounds=7, caches=("cold",), graph=False)
EAGER = ("torch", "native", "cudnn-op")
PARTS = (
    Part("correctness", 120, correctness),
    Part("machine", 20, machine),
    Part("resnet50", 150, of_suite(suites.RESNET50, "resnet50", suites.LAYOUTS[::-1], BOTH, EAGER, SHORT)),
    Part("groupnorm", 45, of_suite(
        suites.SD15_UNET, "sd-unet", suites.LAYOUTS, BOTH[:1], ("torch", "apex", "liger"), SHORT)),
    Part("step", 80, steps),
    Part("compiled", 45, of_suite(
        suites.RESNET50, "resnet50", ("channels_last",), BOTH[:1], ("compile", "compile-max"), COMPILED)),
    Part("cudnn-frontend", 15, cudnn_frontend),
    Part("latencies", 15, latencies),
    Part("tiles", 20, tiles),
    Part("kernels", 10, kernels),  # after all that is timed: see kernels_run.py
    Part("sanitizer", 20, sanitizer),
)  # fmt: skip


def run_part(session: Session, part: Part, seconds: float) -> None:
    """Its records go to NAME.csv, its fate to the summary."""
    path, start, count = session.folder / f"{part.name}.csv", time.monotonic(), 0
    state, text = "DONE", ""
    shared = stamp.columns(session.device)
    try:
        if seconds < FEWEST_SECONDS:
            raise TimeoutError("no time was left")
        for record in part.work(session, seconds):
            missing = {name: value for name, value in shared.items() if not getattr(record, name)}
            records.append(path, [dataclasses.replace(record, **missing)])
            count += 1
    except TimeoutError as e:
        state, text = "PART", str(e)
    except NotHere as e:
        state, text = "NOT RUN", str(e)
    except Exception as e:
        state, text = "FAIL", measure.one_line(e)
    took = time.monotonic() - start
    session.note(part.name, state, f"{count} records in {took:.0f} s{'; ' + text if text else ''}")


def lost(session: Session) -> bool:
    """Whether the GPU answers this process no more, as after an illegal access, whoever's kernel made it."""
    try:
        if session.gpu:
            torch.cuda.synchronize(session.device)
    except RuntimeError:
        return True
    return False


def elsewhere(session: Session, parts: Sequence[str], seconds: float) -> None:
    """These parts in a process of their own, whose folder is in this one's."""
    session.note("the GPU", "FAIL", f"it was lost; {', '.join(parts)} run anew, see rest.log")
    left = int(seconds - LAST_WORDS)
    if left > SUMMARY + FEWEST_SECONDS:
        where = [f"--device={session.device}", f"--out={session.folder.absolute()}", f"--limit={left}"]
        process(session, "rest", [sys.executable, "-m", "benchmarks", "gpu", *where, "--part", *parts], left)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """All parts, or those asked for; then tables of all that was measured."""
    session = begin(options, lacking, "bnfast: what a GPU is needed for")
    if not session.gpu:
        session.note(
            "gpu", "NOT RUN", "needs a GPU; `python3 -m benchmarks run --suite all` predicts without one"
        )
        session.close()
        return 1
    end = session.start + options.limit - SUMMARY
    parts = [part for part in PARTS if not options.part or part.name in options.part]
    with report.progress(len(parts), "parts") as bar:
        for number, part in enumerate(parts):
            share = part.seconds / sum(each.seconds for each in parts[number:])
            run_part(session, part, share * (end - time.monotonic()))
            bar.update(1)
            rest = [part.name for part in parts[number + 1 :]]
            if rest and lost(session):
                elsewhere(session, rest, end - time.monotonic())
                break
    try:
        found = show.load([session.folder])
    except ValueError:
        found = []
    show.show(found, session.folder, lacking)
    for line in tile_sweep.beaten(found):
        report.paragraph(f"A better tile: {line}")
    return session.close()
