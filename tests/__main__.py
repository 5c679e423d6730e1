"""`python3 -m tests`: everything that can be checked on this machine, in one command that sets itself up.

    python3 -m tests                  all of it
    python3 -m tests --quick          the tests in Triton's interpreter and in plain torch only
    python3 -m tests -- -k running    what follows the two dashes goes to every pytest

Triton decides once a process whether it interprets or compiles, so each kind of test has its own process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks import environment

ROOT = environment.ROOT
OTHER_TRITON = "3.6.0"  # the oldest one supported; requirements.txt names a newer one
NO_TESTS = 5  # pytest's exit code for "nothing collected"


@dataclass(frozen=True)
class Outcome:
    """What one part came to. A part that ought to have run and did not counts as one failure."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""

    def line(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{self.name:<34} {counts:<34} {self.seconds:6.0f} s  {self.note}".rstrip()


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


def check(name: str, *command: str) -> Outcome:
    """A tool that checks the sources: one test, passed if it exits with 0."""
    headline(name)
    start = time.monotonic()
    ok = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode == 0
    return Outcome(name, passed=int(ok), failed=int(not ok), seconds=time.monotonic() - start)


def counts(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped, from the report that pytest wrote for machines."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return total - failures - errors - skipped, failures + errors, skipped


def suite(
    name: str,
    arguments: list[str],
    extra: list[str],
    *,
    python: str = sys.executable,
    interpret: bool = False,
    may_be_empty: bool = False,
) -> Outcome:
    """One pytest process: with the kernels interpreted or compiled, of this Python or another."""
    headline(name)
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        variables["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # A worker a core, except on a GPU, which the workers would have to share.
        spread = [] if "gpu" in arguments or importlib.util.find_spec("xdist") is None else ["-n", "auto"]
        command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *spread, *arguments, *extra]
        code = subprocess.run(command, cwd=ROOT, env=variables).returncode
        passed, failed, skipped = counts(report) if report.exists() else (0, 0, 0)
    note = ""
    if code == NO_TESTS and not may_be_empty:
        failed, note = failed + 1, "FAILED: it holds no test"
    elif code not in (0, NO_TESTS):
        failed, note = max(failed, 1), f"FAILED: pytest's exit code is {code}"
    return Outcome(name, passed, failed, skipped, time.monotonic() - start, note)


def in_interpreter(extra: list[str]) -> Outcome:
    selection = ["tests", "--ignore=tests/static", "-m", "not static and not gpu"]
    name = "interpreter, reference, framework"
    return suite(name, selection, extra, interpret=True, may_be_empty=bool(extra))


def compiled(extra: list[str]) -> list[Outcome]:
    """The static tests, with this environment's Triton and with the other one."""
    selection = ["tests/static", "-m", "static"]
    present = metadata.version("triton")
    found = [suite(f"static, Triton {present}", selection, extra, may_be_empty=bool(extra))]
    if present == OTHER_TRITON:
        return found
    name = f"static, Triton {OTHER_TRITON}"
    own = environment.venv_folder()
    folder = own.with_name(f"{own.name}-triton-{OTHER_TRITON}")
    try:
        headline(f"an environment with Triton {OTHER_TRITON}")
        python = environment.layered(folder, [f"triton=={OTHER_TRITON}"])
    except SystemExit:
        return [*found, Outcome(name, failed=1, note="FAILED: its environment could not be made")]
    return [*found, suite(name, selection, extra, python=str(python), may_be_empty=bool(extra))]


def on_gpu(extra: list[str]) -> Outcome:
    import torch

    if not torch.cuda.is_available():
        return Outcome("gpu", note="not run: no CUDA device here")
    return suite("gpu", ["tests", "--ignore=tests/static", "-m", "gpu"], extra, may_be_empty=True)


def main(arguments: list[str]) -> int:
    own, extra = arguments, []
    if "--" in arguments:
        split = arguments.index("--")
        own, extra = arguments[:split], arguments[split + 1 :]
    parser = argparse.ArgumentParser(prog="python3 -m tests", description="Checks bnfast on this machine.")
    parser.add_argument("--quick", action="store_true", help="only the tests without compiled kernels")
    quick = parser.parse_args(own).quick

    lacking = environment.ensure(environment.TO_TEST)
    if lacking:
        environment.stop(f"cannot test: this Python lacks {', '.join(lacking)} (see requirements.txt).")

    outcomes = []
    if not quick:
        outcomes += [check("ruff", "ruff", "check", "."), check("mypy", "mypy")]
    outcomes.append(in_interpreter(extra))
    if not quick:
        outcomes += [*compiled(extra), on_gpu(extra)]

    headline("summary")
    for outcome in outcomes:
        print(outcome.line())
    passed, failed, skipped = (
        sum(getattr(outcome, key) for outcome in outcomes) for key in ("passed", "failed", "skipped")
    )
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
