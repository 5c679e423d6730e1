"""The job `gpu`: what a GPU is needed for, as much as nine minutes allow, in one command.

The most valuable parts come first; each has its share of the time and writes its records to disk as they are
made; a part that fails, or that has no time left, does not stop the next. Tests, and some of them under
compute-sanitizer, are commands of their own."""

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import (
    ROOT,
    cudnn,
    machine,
    measure,
    predict,
    records,
    report,
    stamp,
    step,
    suites,
    tile_sweep,
)
from benchmarks.baselines import lacks
from benchmarks.cases import of_network
from benchmarks.layers import Run
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.session import Session, begin, paragraph, progress
from benchmarks.suites import Network
from benchmarks.timing import one_line

SUMMARY = 15.0  # seconds, for what comes before and after the parts
LAST_WORDS = 5.0  # seconds, for a process that was interrupted
FEWEST_SECONDS = 8.0  # for a part to begin at all
# What compute-sanitizer runs, many times slower: whole channels_last rows, planes, and a row a channel.
SANITIZED = (
    "-m", "gpu", "tests/gpu/test_parity.py",
    "-k", "forms- and bfloat16 and (9x24x50 or 6x24x14x14 or 200x24)",
)  # fmt: skip
# The files with tests for a GPU, what matters most first. Each group is a process of its own, since one
# compiles the kernels of all its tests before the first of them runs.
TESTS: dict[str, tuple[str, ...]] = {
    "correctness": ("gpu/test_parity", "kernels/test_results", "kernels/test_hostile"),
    "correctness-fused": ("gpu/test_fused",),
    "correctness-runtime": tuple(f"gpu/test_{name}" for name in ("measure", "step", "streams", "hostpath")),
    "correctness-shapes": ("gpu/test_large",),
}
PYTEST = (sys.executable, "-m", "pytest")
OUT_OF_TIME = "out of time; "
Work = Callable[[Session, float], Iterable[Record]]


class NotHere(Exception):
    """What a part needs is not on this machine."""


@dataclass(frozen=True)
class Part:
    """work: makes records, and keeps to the seconds that it is given: what it yields is kept however late.
    TimeoutError: it was not done. seconds: its share, as large as the others' are; what it leaves goes to
    those after it."""

    name: str
    seconds: float
    work: Work


# processes


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What a shell runs in the background ignores interrupts, and so would what is started here."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def process(session: Session, name: str, command: Sequence[str], seconds: float) -> Record:
    """A command of its own, whose output goes to a file; a record of how it ended, CANNOT if it did not end
    well. When the time is up it is interrupted, so that pytest still tells what it found, and then killed
    with all that it has started."""
    path = session.folder / f"{name}.log"
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # so that the log of a test whose kernel never ends names the test
    variables["PYTHONUNBUFFERED"] = "1"
    start, out_of_time = time.monotonic(), ""
    with path.open("w", encoding="utf-8") as file:
        output = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        with interruptible():
            running = subprocess.Popen(command, cwd=ROOT, env=variables, **output)  # type: ignore[call-overload]
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
    note = f"{out_of_time}exit code {running.returncode}; {said[-1] if said else 'no output'}"[:300]
    return Record("probe", status, variant=name, us=round(took * 1e6), note=note)


def processes(session: Session, commands: Mapping[str, Sequence[str]], seconds: float) -> Iterator[Record]:
    """One after another; the first takes what it needs. Raises, after all of them, what one said that did not
    end well: rather one that failed than one that was late."""
    end, problems = time.monotonic() + seconds, list[Exception]()
    for name, command in commands.items():
        left = end - time.monotonic() - LAST_WORDS
        if left < FEWEST_SECONDS:
            problems.append(TimeoutError(f"no time was left for {name}"))
            break
        record = process(session, name, command, left)
        yield record
        if record.status == CANNOT:
            late = record.note.startswith(OUT_OF_TIME)
            problems.append((TimeoutError if late else RuntimeError)(f"{name}: {record.note}"))
    if problems:
        raise min(problems, key=lambda problem: isinstance(problem, TimeoutError))


def correctness(session: Session, seconds: float) -> Iterator[Record]:
    commands = {}
    for name, files in TESTS.items():
        xml = session.folder.absolute() / f"{name}.xml"
        options = ["-v", "--tb=short", "-m", "gpu", "--maxfail=50", f"--junitxml={xml}"]
        commands[name] = [*PYTEST, *options, *(f"tests/{file}.py" for file in files)]
    return processes(session, commands, seconds)


def sanitizer(session: Session, seconds: float) -> Iterator[Record]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise NotHere("compute-sanitizer is not on this machine")
    watched = ["--error-exitcode", "9", *PYTEST, "-q", "-x", *SANITIZED]
    tools = {f"sanitizer-{tool}": [program, "--tool", tool, *watched] for tool in ("memcheck", "racecheck")}
    return processes(session, tools, seconds)


# what is measured in this process


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
) -> Work:  # fmt: skip
    """What is predicted of the layers, then what is measured."""

    def work(session: Session, seconds: float) -> Iterator[Record]:
        ways = [(dtype, layout == "channels_last") for layout in layouts for dtype in dtypes]
        todo = [case for way in ways for case in of_network(suite, network, *way)]
        yield from predict.records(todo, compiled=False)
        run = Run(session, method, names, None)  # run_part writes what this makes
        yield from limited((record for case in todo for record in run.case(case)), seconds)

    return work


def copies(session: Session, seconds: float) -> Iterator[Record]:
    return limited(machine.copies(session.device), seconds)


def latencies(session: Session, seconds: float) -> Iterator[Record]:
    return limited(machine.launches(session.device), seconds)


def steps(session: Session, seconds: float) -> Iterator[Record]:
    task = step.Task(session.device)
    return step.measure_steps(task, step.BATCHES, seconds, step.STAGES, step.EFFORT)


def tiles(session: Session, seconds: float) -> Iterator[Record]:
    return limited(tile_sweep.sweep(session.device), seconds)


def cudnn_graphs(session: Session, seconds: float) -> Iterable[Record]:
    why = lacks(cudnn.PACKAGE)
    if why is not None:
        raise NotHere(why)
    last, names = suites.LAYOUTS[::-1][:1], ("cudnn-frontend",)
    return of_suite(suites.RESNET50, "resnet50", last, BOTH, names, SHORT)(session, seconds)


BOTH = (torch.bfloat16, torch.float16)
SHORT = measure.Method(rounds=7)
COMPILED = measure.Method(rounds=7, caches=("cold",), graph=False)
EAGER = ("torch", "native", "cudnn-op")
PARTS = (
    Part("correctness", 120, correctness),
    Part("machine", 20, copies),
    Part("resnet50", 150, of_suite(suites.RESNET50, "resnet50", suites.LAYOUTS[::-1], BOTH, EAGER, SHORT)),
    Part("groupnorm", 45, of_suite(
        suites.SD15_UNET, "sd-unet", suites.LAYOUTS, BOTH[:1], ("torch", "apex", "liger"), SHORT)),
    Part("step", 80, steps),
    Part("compiled", 45, of_suite(
        suites.RESNET50, "resnet50", ("channels_last",), BOTH[:1], ("compile", "compile-max"), COMPILED)),
    Part("cudnn-frontend", 15, cudnn_graphs),
    Part("latencies", 15, latencies),
    Part("tiles", 20, tiles),
    Part("sanitizer", 20, sanitizer),
)  # fmt: skip


# the job


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
        state, text = "FAIL", one_line(e)
    took = time.monotonic() - start
    session.note(part.name, state, f"{count} records in {took:.0f} s{'; ' + text if text else ''}")


def lost(session: Session) -> bool:
    """Whether the GPU answers this process no more, as after an illegal access, whoever's kernel made it."""
    try:
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
        text = "needs a GPU; `python3 -m benchmarks run --suite all` predicts without one"
        session.note("gpu", "NOT RUN", text)
        session.close()
        return 1
    end = session.start + options.limit - SUMMARY
    parts = [part for part in PARTS if not options.part or part.name in options.part]
    for number, part in enumerate(progress(parts, desc="parts")):
        share = part.seconds / sum(each.seconds for each in parts[number:])
        run_part(session, part, share * (end - time.monotonic()))
        rest = [part.name for part in parts[number + 1 :]]
        if rest and lost(session):
            elsewhere(session, rest, end - time.monotonic())
            break
    if any(session.folder.rglob("*.csv")):
        found = records.load([session.folder])
        report.show(found, session.folder, lacking)
        for line in tile_sweep.beaten(found):
            paragraph(f"A better tile: {line}")
    return session.close()
