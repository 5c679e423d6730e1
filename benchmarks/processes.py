"""Commands of their own that the battery runs: tests on a GPU, and some of them under compute-sanitizer."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.session import Session

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
        with interruptible():
            running = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
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


def sanitizer(session: Session, seconds: float) -> Iterator[Record]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise NotHere("compute-sanitizer is not on this machine")
    end = time.monotonic() + seconds

    def tools() -> Iterator[Record]:
        """The first takes what it needs."""
        for tool in ("memcheck", "racecheck"):
            left = end - time.monotonic() - LAST_WORDS
            if left < FEWEST_SECONDS:
                raise TimeoutError(f"no time was left for {tool}")
            watched = [program, "--tool", tool, "--error-exitcode", "9", *PYTEST, "-q", "-x", *SANITIZED]
            yield process(session, f"sanitizer-{tool}", watched, left)

    yield from judged(tools())
