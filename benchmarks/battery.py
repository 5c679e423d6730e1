"""The job `gpu`: what a GPU is needed for, as much as nine minutes allow, in one command.

The most valuable parts come first. Each has its share of the time and runs in processes of its own, so that a
part that fails, hangs, loses the GPU or has no time left does not stop the next one. What it measures is on
disk as it is made."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import ROOT, cudnn, measure, predict, records, report, stamp, step, suites, tile_sweep
from benchmarks.baselines import lacks
from benchmarks.cases import of_network
from benchmarks.layers import Run
from benchmarks.machine import copies
from benchmarks.records import CANNOT, MEASURED, PREDICTED, Record
from benchmarks.session import Session, begin, paragraph, progress
from benchmarks.suites import Network

SUMMARY = 15.0  # seconds, for what comes before and after the parts
LAST_WORDS = 5.0  # seconds, for a process that was interrupted
FEWEST_SECONDS = 8.0  # for a process to begin at all
EARLIER = 3.0  # a process that measures ends by itself so many seconds before it would be interrupted
# The tests for a GPU, what matters most first: (files, which of their tests). Each is a process of its own,
# since one compiles the kernels of all its tests before the first of them runs; so the first one is small.
MOST_TELLING = "(forms- or hostile-) and not float16"
TESTS = {
    "correctness": ("gpu/test_parity", MOST_TELLING),
    "correctness-runtime": ("gpu/test_measure gpu/test_streams gpu/test_hostpath kernels/test_results", ""),
    "correctness-fused": ("contract/test_activation", ""),
    "correctness-rest": ("gpu/test_parity kernels/test_hostile", f"not ({MOST_TELLING})"),
    "correctness-shapes": ("gpu/test_large", ""),
}
LATE = "out of time; "
OVERLAPPING = "bnfast-pdl"
Work = Callable[[Session, float], Iterable[Record]]


@dataclass(frozen=True)
class Part:
    """seconds: its share, as large as the others' are; what it leaves goes to those after it. work: makes
    records, in a process of its own; without it TESTS are run, each in its own, and the part fails if the
    one of its name does not end in time. package: without which it cannot run. variables: of the
    environment, NAME=VALUE, of the process of `work`."""

    name: str
    seconds: float
    work: Work | None = None
    package: str = ""
    variables: tuple[str, ...] = ()

    def commands(self, session: Session) -> dict[str, list[str]]:
        """By the names of their processes."""
        folder = session.folder.absolute()
        if self.work:
            given = [self.name, str(folder), str(session.device)]
            python = [*(("env", *self.variables) if self.variables else ()), sys.executable]
            return {self.name: [*python, "-m", "benchmarks.battery", *given]}
        commands = {}
        for name, (files, selected) in TESTS.items():
            options = ["-v", "--tb=short", "-m", "gpu", "--maxfail=50", f"--junitxml={folder / name}.xml"]
            options += ["-k", selected] if selected else []
            paths = [f"tests/{file}.py" for file in files.split()]
            commands[name] = [sys.executable, "-m", "pytest", *options, *paths]
        return commands


def of_suite(
    network: Network, suite: str, layouts: Sequence[str], dtypes: Sequence[torch.dtype], names: Sequence[str],
    method: measure.Method,
) -> Work:  # fmt: skip
    """What is predicted of the layers, then what is measured."""

    def work(session: Session, seconds: float) -> Iterator[Record]:
        ways = [(dtype, layout == "channels_last") for layout in layouts for dtype in dtypes]
        todo = [case for way in ways for case in of_network(suite, network, *way)]
        yield from predict.records(todo, compiled=False)
        run = Run(session, method, names, None)  # `work` below writes what this makes
        for case in todo:
            yield from run.case(case)

    return work


def overlapping(work: Work) -> Work:
    """What is measured in a process in which the launches of a call overlap (BNFAST_PDL=1), under another
    name, so that tables have it beside what another process has measured of the same cases."""

    def renamed(session: Session, seconds: float) -> Iterator[Record]:
        if session.device.type != "cuda" or torch.cuda.get_device_capability(session.device) < (9, 0):
            yield Record("probe", CANNOT, variant=OVERLAPPING, note="needs compute capability 9.0")
            return
        for record in work(session, seconds):
            if record.status != PREDICTED:
                yield dataclasses.replace(record, variant=OVERLAPPING)

    return renamed


def steps(session: Session, seconds: float) -> Iterator[Record]:
    return step.measure_steps(step.Task(session.device), step.BATCHES, seconds, step.STAGES)


LAST, BOTH = suites.LAYOUTS[::-1], (torch.bfloat16, torch.float16)
SHORT = measure.Method(rounds=7)
COLD = measure.Method(rounds=7, caches=("cold",), graph=False)
ALONE = measure.Method(rounds=7, caches=("cold",))
RESNET, UNET = (suites.RESNET50, "resnet50"), (suites.SD15_UNET, "sd-unet")
PARTS = (
    Part("correctness", 120),
    Part("machine", 25, lambda session, seconds: copies(session.device)),
    Part("resnet50", 150, of_suite(*RESNET, LAST, BOTH, ("torch", "native", "cudnn-op"), SHORT)),
    Part("groupnorm", 50, of_suite(*UNET, suites.LAYOUTS, BOTH[:1], ("torch",), SHORT)),
    Part("step", 85, steps),
    Part(
        "overlap",
        20,
        overlapping(of_suite(*RESNET, LAST[:1], BOTH[:1], (), ALONE)),
        variables=("BNFAST_PDL=1",),
    ),  # fmt: skip
    Part("compiled", 50, of_suite(*RESNET, LAST[:1], BOTH[:1], ("compile", "compile-max"), COLD)),
    Part("cudnn-frontend", 15, of_suite(*RESNET, LAST[:1], BOTH, ("cudnn-frontend",), SHORT), cudnn.PACKAGE),
    Part("tiles", 25, lambda session, seconds: tile_sweep.sweep(session.device)),
)


def process(session: Session, name: str, command: Sequence[str], seconds: float) -> Record:
    """A command of its own, whose output goes to a file; a record of how it ended, CANNOT if it did not end
    well. When the time is up it is interrupted, so that pytest still tells what it found, and then killed
    with all that it has started."""
    path, start, late = session.folder / f"{name}.log", time.monotonic(), ""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # so that the log of a test whose kernel never ends names the test
    variables["PYTHONUNBUFFERED"] = "1"
    with path.open("w", encoding="utf-8") as file:
        output = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        running = subprocess.Popen(command, cwd=ROOT, env=variables, **output)  # type: ignore[call-overload]
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            late = LATE
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
    note = f"{late}exit code {running.returncode}; {said[-1] if said else 'no output'}"[:300]
    status = CANNOT if running.returncode != 0 or late else MEASURED
    return Record("probe", status, variant=name, us=round(took * 1e6), note=note)


def run_part(session: Session, part: Part, seconds: float) -> None:
    """Its records go to NAME.csv, the output of its processes to files of their names, its fate to the
    summary: rather a failure than that it was late."""
    start, path = time.monotonic(), session.folder / f"{part.name}.csv"
    why = lacks(part.package) if part.package else None
    if why is not None:
        session.note(part.name, "NOT RUN", why)
        return
    late, failed = "", ""
    for name, command in part.commands(session).items():
        left = start + seconds - LAST_WORDS - time.monotonic()
        if left < FEWEST_SECONDS:
            late = late or f"; no time was left for {name}"
            break
        if part.work:
            command = [*command, str(time.time() + left - EARLIER)]
        record = process(session, name, command, left)
        records.append(path, [dataclasses.replace(record, **stamp.columns(session.device))])
        if record.status == CANNOT and record.note.startswith(LATE) and (part.work or name != part.name):
            late = late or f"; {name}: {record.note}"
        elif record.status == CANNOT:
            failed = failed or f"; {name}: {record.note}"
    found = records.read(path) if path.exists() else records.frame([])
    wrong = found["variant"][found["note"].str.contains(measure.WRONG)]
    ours = ", ".join(sorted({*wrong} - (measure.BASELINES.keys() - {"bnfast"})))
    failed = failed or (f"; {ours}: {measure.WRONG}" if ours else "")
    state = "FAIL" if failed else "PART" if late else "DONE"
    took = time.monotonic() - start
    session.note(part.name, state, f"{len(found)} records in {took:.0f} s{failed or late}")


def main(name: str, folder: str, device: str, end: str) -> None:
    """The process of a part that measures. end: when it is to end, in seconds of time.time()."""
    session = Session(Path(folder), torch.device(device), [])
    if session.device.type == "cuda":
        torch.cuda.set_device(session.device)
    (work,) = (part.work for part in PARTS if part.name == name)
    assert work is not None
    shared = stamp.columns(session.device)
    for record in work(session, float(end) - time.time()):
        missing = {name: value for name, value in shared.items() if not getattr(record, name)}
        records.append(session.folder / f"{name}.csv", [dataclasses.replace(record, **missing)])


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """All parts, or those asked for; then tables of all that was measured."""
    session = begin(options, lacking, "bnfast: what a GPU is needed for")
    if not session.gpu:
        text = "needs a GPU; `python3 -m benchmarks run --suite all` predicts without one"
        session.note("gpu", "NOT RUN", text)
        session.close()
        return 1
    # What a shell runs in the background ignores interrupts, and so would the processes started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end = session.start + options.limit - SUMMARY
    parts = [part for part in PARTS if not options.part or part.name in options.part]
    for number, part in enumerate(progress(parts, desc="parts")):
        share = part.seconds / sum(each.seconds for each in parts[number:])
        run_part(session, part, share * (end - time.monotonic()))
    if any(session.folder.glob("*.csv")):
        found = records.load([session.folder])
        report.show(found, session.folder, lacking)
        for line in tile_sweep.beaten(found):
            paragraph(f"A better tile: {line}")
    return session.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
