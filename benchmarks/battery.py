"""The job `gpu`: everything that a GPU is needed for, in one command of at most nine minutes.

The most valuable parts come first, each has its share of the time and writes its records to disk as they are
made; a part that fails, or that has no time left, does not stop the next."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases, measure, model_step, predict, records, report, show, stamp, suites, tile_sweep
from benchmarks.baselines import cudnn_graphs
from benchmarks.baselines.contender import lacks
from benchmarks.layers import Run
from benchmarks.machine import bandwidth, clocks, l2, launch
from benchmarks.model_variants import Task
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.session import Session, begin
from benchmarks.suites import Network

SUMMARY = 15.0  # seconds, for what comes before and after the parts
# What compute-sanitizer runs, many times slower: whole channels_last rows, planes, and a row a channel.
SANITIZED = (
    "-m", "gpu", "tests/gpu/test_parity.py",
    "-k", "forms and bfloat16 and (9x24x50 or 6x24x14x14 or 200x24)",
)  # fmt: skip
# The files of tests/gpu, what matters most first. Each group is a process of its own, since one compiles the
# kernels of all its tests before the first of them runs.
TESTS: dict[str, tuple[str, ...]] = {
    "correctness": ("parity",),
    "correctness-fused": ("fused", "batchrenorm"),
    "correctness-groups": ("groupnorm", "instancenorm", "layernorm"),
    "correctness-runtime": ("measure", "model_step", "streams", "determinism", "hostpath"),
    "correctness-shapes": ("random_shapes", "large"),
}
PYTEST = (sys.executable, "-m", "pytest")
OUT_OF_TIME = "out of time; "
LAST_WORDS = 5.0  # seconds, for a process that was interrupted
FEWEST_SECONDS = 8.0  # for a part to begin at all
ROOT = Path(__file__).resolve().parent.parent


class NotHere(Exception):
    """What a part needs is not on this machine."""


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
        ways = [(dtype, layout == "channels_last") for dtype in dtypes for layout in layouts]
        todo = [case for way in ways for case in cases.of_network(suite, network, *way)]
        yield from predict.records(todo, compiled=False)
        run = Run(session, method, names, None)  # run_part writes what this makes
        yield from limited((record for case in todo for record in run.case(case)), seconds)

    return work


def process(session: Session, name: str, command: Sequence[str], seconds: float) -> Record:
    """A command of its own, whose output goes to a file; a record of how it ended, CANNOT if it did not end
    well. When the time is up it is interrupted, so that pytest still tells what it found, and then killed
    with all that it has started."""
    path = session.folder / f"{name}.log"
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables["PYTHONUNBUFFERED"] = (
        "1"  # so that a log that ends with a kernel that never does names its test
    )
    start, out_of_time = time.monotonic(), ""
    with path.open("w", encoding="utf-8") as file:
        running = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            out_of_time = OUT_OF_TIME
            running.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(LAST_WORDS)
        finally:  # also if somebody interrupts this command
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(LAST_WORDS)  # not for ever: the driver may hold it
    took = time.monotonic() - start
    said = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    status = CANNOT if running.returncode != 0 or out_of_time else MEASURED
    return Record(
        kind="probe", status=status, variant=name, us=round(took * 1e6),
        note=f"{out_of_time}exit code {running.returncode}; {said[-1] if said else 'no output'}"[:300],
    )  # fmt: skip


def judged(found: Iterable[Record]) -> Iterator[Record]:
    """Of processes. Raises, after all of them, what one said that did not end well: rather one that failed
    than one that was late."""
    problems: list[Exception] = []
    try:
        for record in found:
            yield record
            if record.status == CANNOT:
                late = record.note.startswith(OUT_OF_TIME)
                problems.append((TimeoutError if late else RuntimeError)(f"{record.variant}: {record.note}"))
    except TimeoutError as e:
        problems.append(e)
    if problems:
        raise min(problems, key=lambda problem: isinstance(problem, TimeoutError))


def correctness(session: Session, seconds: float) -> Iterator[Record]:
    end = time.monotonic() + seconds

    def groups() -> Iterator[Record]:
        for name, files in TESTS.items():
            left = end - time.monotonic() - LAST_WORDS
            if left < FEWEST_SECONDS:
                raise TimeoutError(f"no time was left for {name}")
            xml = session.folder.absolute() / f"{name}.xml"
            tests = [f"tests/gpu/test_{file}.py" for file in files]
            options = ["-v", "--tb=short", "-m", "gpu", "--maxfail=50", f"--junitxml={xml}"]
            yield process(session, name, [*PYTEST, *options, *tests], left)

    return judged(groups())


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


def sanitizer(session: Session, seconds: float) -> Iterator[Record]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise NotHere("compute-sanitizer is not on this machine")
    watched = (
        (
            f"sanitizer-{tool}",
            [program, "--tool", tool, "--error-exitcode", "9", *PYTEST, "-q", "-x", *SANITIZED],
        )
        for tool in ("memcheck", "racecheck")
    )
    yield from judged(process(session, *each, seconds / 2 - LAST_WORDS) for each in watched)


BOTH = (torch.bfloat16, torch.float16)
SHORT = measure.Method(rounds=9)
COMPILED = measure.Method(rounds=9, caches=("cold",), graph=False)
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


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """All parts, or those asked for; then tables of all that was measured."""
    session = begin(options, lacking, "bnfast: everything that a GPU is needed for")
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
    try:
        found = show.load([session.folder])
    except ValueError:
        found = []
    show.show(found, session.folder, lacking)
    for line in tile_sweep.beaten(found):
        report.paragraph(f"A better tile: {line}")
    return session.close()
