"""`python3 -m tests`: everything that can be checked on this machine, in one command that sets itself up.

    python3 -m tests                all tests; half of the cases of each that compiles, and with the oldest
                                    PyTorch and Triton what covers every kernel
    python3 -m tests --all          all cases with every Triton, and with the oldest PyTorch
    python3 -m tests --quick        in three minutes: every sixth case of each test of kernels and layers
    python3 -m tests -- -k running  what follows the two dashes goes to every pytest

Triton decides once a process whether it interprets or compiles, so each kind of test has its own process.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from benchmarks import environment

ROOT = environment.ROOT
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")  # codegen/budgets.csv has columns of each
NO_TESTS = 5  # pytest's exit code for "nothing collected"


class Gate(NamedTuple):
    """What one pytest process is told to run, with the kernels interpreted or compiled."""

    name: str
    selection: tuple[str, ...]
    interpret: bool = False


def files(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/{name}.py" for name in names)


TESTS = ("tests", "--ignore=tests/static", "-m")
WHOLE = Gate("interpreter and torch", (*TESTS, "not static and not gpu and not compiled"), interpret=True)
COMPILED = Gate("compiled PTX", (*TESTS, "compiled and not gpu", "--compiled"))
QUICK = Gate(WHOLE.name, (*TESTS, "not static and not gpu and not slow", "--sample=6"), interpret=True)
BUDGETS = Gate("budgets", (*files("static/test_budgets"), "-m", "static"))
STATIC = Gate("static", ("tests/static", f"--ignore={BUDGETS.selection[0]}", "-m", "static"))
# Compiling takes most of the time of both, and neighbouring cases compile much that is alike.
HALVES = tuple(
    Gate(f"{gate.name}, half of the cases", (*gate.selection, "--sample=2")) for gate in (COMPILED, STATIC)
)
GPU = Gate("gpu", (*TESTS, "gpu"))
LIBRARIES = Gate("libraries", files(
    "test_carrying_subclasses", "convert/test_folding", "convert/test_libraries", "convert/test_models",
    "fuse/test_models",
), interpret=True)  # fmt: skip
# With the oldest pair: every eighth case of what touches most of PyTorch and Triton, and all kernels compiled
OLDEST = Gate(WHOLE.name, ("tests/contract", *files(
    "test_batchnorm_layer", "test_fx_and_script", "test_strides",
    "fuse/test_blocks", "fuse/test_changes", "fuse/test_left",
    "convert/test_convert", "convert/test_converters", "convert/test_folding",
), "-m", "not compiled", "--sample=8"), interpret=True)  # fmt: skip
SOME_COMPILED = Gate(COMPILED.name, (*COMPILED.selection, "--sample=8"))
# What layers owe that the interpreter's gate has, since most of its time on compiled PTX would be compiling.
# The rest of that gate is about plans, launches, graphs, fusing, converting and benchmarks, not the kernels.
EXECUTED = Gate(f"{COMPILED.name}, layers", (*files(
    "contract/test_activation", "contract/test_memory", "contract/test_training", "convert/test_revert",
    "test_batchnorm_layer", "test_strides",
), "-m", "not compiled and not gpu", "--compiled"))  # fmt: skip
# With approximate instructions moved within their documented error, in two ways
PERTURBED = tuple(
    Gate(f"{COMPILED.name}, perturbed by {n}", (*files(
        "kernels/test_activations", "kernels/test_hostile", "kernels/test_numerics",
    ), *COMPILED.selection[-3:], f"--perturb={n}"))
    for n in (1, 2)
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one gate came to. A gate that ought to have run and did not counts as one failure."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""

    def line(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{self.name:<52} {counts:<34} {self.seconds:6.0f} s  {self.note}".rstrip()


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


def check(name: str) -> Outcome:
    """A tool that checks the sources: one test, passed if it exits with 0."""
    headline(name)
    start = time.monotonic()
    ok = subprocess.run([sys.executable, "-m", *name.split()], cwd=ROOT).returncode == 0
    return Outcome(name, passed=int(ok), failed=int(not ok), seconds=time.monotonic() - start)


@functools.cache
def no_compiler() -> str | None:
    """Why compiled PTX cannot be executed here, or None."""
    from bnfast.ptx import library

    try:
        library.load()
    except library.MissingCompiler as missing:
        return str(missing)
    return None


def feasible(gate: Gate) -> Gate:
    """The gate itself; without a C compiler, in place of one that executes PTX, its tests interpreted."""
    if "--compiled" not in gate.selection or not (reason := no_compiler()):
        return gate
    print(f"\n{reason}.\nThe tests of compiled PTX run in Triton's interpreter instead.", flush=True)
    selection = tuple(each for each in gate.selection if each != "--compiled")
    return Gate(f"{gate.name} (interpreted: no C compiler)", selection, interpret=True)


def suite(gate: Gate, where: str, extra: list[str], python: str = sys.executable) -> Outcome:
    """A gate in one pytest process of some Python. extra: what the user hands to each pytest."""
    gate = feasible(gate)
    name = f"{gate.name}, {where}" if where else gate.name
    headline(name)
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= {"TRITON_INTERPRET": "1"} if gate.interpret else {}
    start, total = time.monotonic(), dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # A worker a core, except on a GPU, which the workers would have to share.
        spread = [] if gate is GPU or importlib.util.find_spec("xdist") is None else ["-n", "auto"]
        command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *spread, *gate.selection, *extra]
        code = subprocess.run(command, cwd=ROOT, env=variables).returncode
        for each in ElementTree.parse(report).iter("testsuite") if report.exists() else ():
            total = {key: count + int(each.get(key, 0)) for key, count in total.items()}
    failed, note = total["failures"] + total["errors"], ""
    passed = total["tests"] - failed - total["skipped"]
    if code == NO_TESTS and not extra and gate is not GPU:
        failed, note = failed + 1, "FAILED: it holds no test"
    elif code not in (0, NO_TESTS):
        failed, note = max(failed, 1), f"FAILED: pytest's exit code is {code}"
    return Outcome(name, passed, failed, total["skipped"], time.monotonic() - start, note)


def pinned(name: str, file: str) -> str:
    """The version of a package in a requirements file."""
    return environment.pins(file)[name][0].partition("==")[2].partition(";")[0]


def elsewhere(
    what: str, name: str, make: Callable[[Path], Path], gates: tuple[Gate, ...], extra: list[str]
) -> Iterator[Outcome]:
    """Gates in an environment of this name, which `make` makes in a folder. That it cannot is a failure."""
    headline(f"an environment with {what}")
    own = environment.venv_folder()
    try:
        python = str(make(own.with_name(f"{own.name}-{name}")))
    except SystemExit:
        yield Outcome(what, failed=1, note="FAILED: its environment could not be made")
    else:
        yield from (suite(gate, what, extra, python) for gate in gates)


def in_environments(everything: bool, extra: list[str]) -> Iterator[Outcome]:
    """In this one, and beside it in those with other versions of Triton, other libraries and the oldest pair;
    and what is not run on this machine, and why."""
    here, newest = metadata.version("triton"), TRITONS[-1]
    further = everything and not no_compiler()
    compiling = (COMPILED, *([EXECUTED] if further else []), STATIC) if everything else HALVES
    whole = (WHOLE, *compiling, BUDGETS)
    on_newest = (*whole, *(PERTURBED if further else []))
    yield from (suite(gate, f"Triton {here}", extra) for gate in (on_newest if here == newest else whole))
    if os.environ.get("BNFAST_NO_SETUP") == "1":
        yield Outcome("other versions", note="not run: BNFAST_NO_SETUP=1 forbids environments for them")
        return
    for triton in TRITONS[:0:-1] if everything else (newest,):
        if triton != here:
            gates = on_newest if everything and triton == newest else (compiling[-1], BUDGETS)
            make = functools.partial(environment.layered, requirements=[f"triton=={triton}"])
            yield from elsewhere(f"Triton {triton}", f"triton-{triton}", make, gates, extra)
    if metadata.version("torch").partition("+")[0] == pinned("torch", "requirements.txt"):
        pins = environment.pins("requirements-libraries.txt").values()
        make = functools.partial(environment.layered, requirements=[line for lines in pins for line in lines])
        yield from elsewhere("timm, Opacus and others", "libraries", make, (LIBRARIES,), extra)
    else:
        yield Outcome("libraries", note="not run: torchvision, as pinned, is built for another PyTorch")
    oldest = {name: pinned(name, "requirements-oldest.txt") for name in ("torch", "triton")}
    if any(metadata.version(name).partition("+")[0] != version for name, version in oldest.items()):
        make = functools.partial(environment.separate, names=("requirements.txt", "requirements-oldest.txt"))
        gates = whole if everything else (OLDEST, SOME_COMPILED, BUDGETS)
        yield from elsewhere(" and ".join(map(" ".join, oldest.items())), "oldest", make, gates, extra)


def on_gpu(extra: list[str]) -> Outcome:
    import torch

    if not torch.cuda.is_available():
        return Outcome("gpu", note="not run: no CUDA device here")
    return suite(GPU, "", extra)


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    extra = arguments[split + 1 :]
    parser = argparse.ArgumentParser(prog="python3 -m tests", description="Checks bnfast on this machine.")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="only fast tests, in this environment")
    how_much.add_argument("--all", action="store_true", help="with every supported Triton: an hour or two")
    options = parser.parse_args(arguments[:split])

    lacking = environment.ensure(environment.TO_TEST)
    if lacking:
        environment.stop(f"cannot test: this Python lacks {', '.join(lacking)} (see requirements.txt).")

    if options.quick:
        outcomes = [suite(QUICK, f"Triton {metadata.version('triton')}", extra)]
    else:
        outcomes = [check(name) for name in ("ruff check .", "ruff format --check .", "mypy")]
        outcomes += [*in_environments(options.all, extra), on_gpu(extra)]

    headline("summary")
    for outcome in outcomes:
        print(outcome.line())
    sums = {key: sum(getattr(each, key) for each in outcomes) for key in ("passed", "failed", "skipped")}
    print(", ".join(f"{count} {key}" for key, count in sums.items()))
    return int(sums["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
