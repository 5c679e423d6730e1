"""`python3 -m tests`: everything that can be checked on this machine, in one command that sets itself up.

    python3 -m tests                all of it; with the oldest PyTorch and Triton, what covers every kernel
    python3 -m tests --all          all of it with every Triton, and with the oldest PyTorch
    python3 -m tests --quick        in three minutes: every sixth case of each test of kernels and layers
    python3 -m tests -- -k running  what follows the two dashes goes to every pytest

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks import environment

ROOT = environment.ROOT
OLDEST = "requirements-oldest.txt"
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")  # codegen/budgets.csv has columns of each
# With the oldest: the static tests that compile every kernel, and every eighth case of what touches most of
# PyTorch and of Triton
COVERING = ("tests/static/test_budgets.py",)
LIBRARIES_TIER = [
    f"tests/{name}.py"
    for name in ("test_carrying_subclasses", "convert/test_folding", "convert/test_models")
    + (
        "convert/test_opacus",
        "convert/test_registries",
        "convert/test_timm_tools",
        "fuse/test_models",
        "fuse/test_report",
    )
]
OLDEST_TIER = ["tests/contract"] + [
    f"tests/{name}.py"
    for name in ("test_autograd", "test_batchnorm_layer", "test_fx_and_script")
    + ("test_operators", "test_strides", "kernels/test_numerics", "fuse/test_blocks")
    + ("convert/test_convert", "convert/test_converters", "convert/test_folding")
]
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


def in_interpreter(extra: list[str], triton: str, python: str, *, quick: bool = False) -> Outcome:
    left_out = "not static and not gpu and not slow" if quick else "not static and not gpu"
    selection = ["tests", "--ignore=tests/static", "-m", left_out, *(["--sample", "6"] if quick else [])]
    name = f"interpreter and torch, Triton {triton}"
    return suite(name, selection, extra, python=python, interpret=True, may_be_empty=bool(extra))


def compiled(extra: list[str], triton: str, python: str, files: Sequence[str] = ("tests/static",)) -> Outcome:
    return suite(
        f"static, Triton {triton}", [*files, "-m", "static"], extra, python=python, may_be_empty=bool(extra)
    )


def elsewhere(what: str, make: Callable[[], Path], tiers: Callable[[str], list[Outcome]]) -> list[Outcome]:
    """Tiers in another environment. That it could not be made is a failure."""
    headline(f"an environment with {what}")
    try:
        python = str(make())
    except SystemExit:
        return [Outcome(what, failed=1, note="FAILED: its environment could not be made")]
    return tiers(python)


def with_triton(triton: str, tiers: Callable[[str], list[Outcome]]) -> list[Outcome]:
    """Tiers in an environment like this one, with this Triton."""
    if metadata.version("triton") == triton:
        return tiers(sys.executable)
    own = environment.venv_folder()
    folder = own.with_name(f"{own.name}-triton-{triton}")
    return elsewhere(f"Triton {triton}", lambda: environment.layered(folder, [f"triton=={triton}"]), tiers)


def with_oldest(everything: bool, extra: list[str]) -> list[Outcome]:
    """The oldest PyTorch and Triton that are supported: every kernel, and what touches PyTorch."""
    torch, triton = (environment.pinned(OLDEST)[name].partition("==")[2] for name in ("torch", "triton"))

    def tiers(python: str) -> list[Outcome]:
        if everything:
            return [in_interpreter(extra, triton, python), compiled(extra, triton, python)]
        name = f"oldest: PyTorch {torch}"
        selection = [*OLDEST_TIER, "--sample", "8"]
        few = suite(name, selection, extra, python=python, interpret=True, may_be_empty=bool(extra))
        return [few, compiled(extra, triton, python, COVERING)]

    if (metadata.version("torch").partition("+")[0], metadata.version("triton")) == (torch, triton):
        return [compiled(extra, triton, sys.executable, ("tests/static",) if everything else COVERING)]
    own = environment.venv_folder()
    return elsewhere(
        f"PyTorch {torch} and Triton {triton}",
        lambda: environment.separate(own.with_name(f"{own.name}-oldest"), "requirements.txt", OLDEST),
        tiers,
    )


def with_libraries(extra: list[str]) -> list[Outcome]:
    """Other libraries' tools and models with bnfast's layers. Where they are missing, these tests skip."""
    own, name = environment.venv_folder(), "with other libraries"
    built_for = environment.pinned("requirements.txt")["torch"].partition("==")[2]
    if metadata.version("torch").partition("+")[0] != built_for:
        return [Outcome(name, note=f"not run: torchvision, as pinned, is built for PyTorch {built_for}")]

    def tiers(python: str) -> list[Outcome]:
        return [suite(name, LIBRARIES_TIER, extra, python=python, interpret=True, may_be_empty=bool(extra))]

    pins = list(environment.pinned("requirements-libraries.txt").values())
    folder = own.with_name(f"{own.name}-libraries")
    return elsewhere("timm, Opacus and other libraries", lambda: environment.layered(folder, pins), tiers)


def without_gpu(extra: list[str], everything: bool) -> list[Outcome]:
    """In this environment, and beside it with the newest Triton and the oldest pair, or with all."""
    here, newest = metadata.version("triton"), TRITONS[-1]
    found = [in_interpreter(extra, here, sys.executable)]
    if os.environ.get("BNFAST_NO_SETUP") == "1":
        rest = Outcome("other versions", note="not run: BNFAST_NO_SETUP=1 forbids environments for them")
        return [*found, compiled(extra, here, sys.executable), rest]

    def on_newest(python: str) -> list[Outcome]:
        interpreted = [in_interpreter(extra, newest, python)] if everything and here != newest else []
        return [*interpreted, compiled(extra, newest, python)]

    found += with_triton(newest, on_newest)
    for triton in TRITONS[1:-1] if everything else ():
        found += with_triton(triton, lambda python, triton=triton: [compiled(extra, triton, python)])
    return [*found, *with_libraries(extra), *with_oldest(everything, extra)]


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
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="only fast tests, in this environment")
    how_much.add_argument("--all", action="store_true", help="with every supported Triton: an hour or two")
    options = parser.parse_args(own)

    lacking = environment.ensure(environment.TO_TEST)
    if lacking:
        environment.stop(f"cannot test: this Python lacks {', '.join(lacking)} (see requirements.txt).")

    if options.quick:
        outcomes = [in_interpreter(extra, metadata.version("triton"), sys.executable, quick=True)]
    else:
        checks = {"ruff": "ruff check .", "ruff format": "ruff format --check .", "mypy": "mypy"}
        outcomes = [check(name, *command.split()) for name, command in checks.items()]
        outcomes += [*without_gpu(extra, options.all), on_gpu(extra)]

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
