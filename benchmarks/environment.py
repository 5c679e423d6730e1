"""Makes `python3 -m benchmarks` and `python3 -m tests` work as the first thing typed after a clone.

`ensure()` looks whether the running Python can import what is needed. Where it cannot, it prepares `.venv` in
the repository (once) and starts the same command again in there. It does so in one of two ways:

full     this Python has no usable torch: requirements.txt is installed, torch first and alone
layered  it has one (a GPU machine's own, say): `.venv` sees this Python's packages and gets only what lacks

Standard library only, and in the syntax of old Pythons, so that those get a sentence and not a SyntaxError.
Settings: BNFAST_NO_SETUP=1 installs nothing; BNFAST_VENV=PATH puts the environment elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 11)
STAMP = "bnfast-stamp"  # a file in an environment made here: the Python, and from what it was finished
RESTARTED = "BNFAST_RESTARTED_IN"  # set in the second start, which must not set up again

OURSELVES = "bnfast.kernels"  # this checkout, installed editable
VITAL = ("torch", "pandas", "tqdm", OURSELVES)  # without these no job runs
# What is imported, by what pip calls it.
TO_BENCHMARK = {name: name for name in ("torch", "numpy", "pandas", "tqdm", "matplotlib")}
TO_BENCHMARK["sklearn"] = "scikit-learn"
if sys.platform == "linux":
    TO_BENCHMARK["triton"] = "triton"
TO_TEST = {**TO_BENCHMARK, "pytest_benchmark": "pytest-benchmark"}
TO_TEST.update((name, name) for name in ("pytest", "hypothesis", "expecttest", "ruff", "mypy"))


INSTALL = ("install", "--retries", "2")
ITSELF = (*INSTALL, "--no-deps", "--no-build-isolation", "-e", str(ROOT))


def say(text: str) -> None:
    print(f"bnfast: {text}", file=sys.stderr, flush=True)


def stop(*lines: str) -> NoReturn:
    for line in lines:
        say(line)
    sys.exit(1)


def venv_folder() -> Path:
    return Path(os.environ.get("BNFAST_VENV") or ROOT / ".venv").absolute()


def pins(*names: str) -> dict[str, list[str]]:
    """The lines of requirement files by package, with their markers, which pip judges. Where several files
    name a package, the last one counts."""
    found: dict[str, list[str]] = {}
    for name in names:
        own: dict[str, list[str]] = {}
        for line in re.findall(r"^\w.*==.*$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE):
            own.setdefault(line.partition("==")[0], []).append(line)
        found.update(own)
    return found


def importable(name: str) -> bool:
    """Whether `name` can be imported; for `bnfast.kernels`: whether that would be this checkout's."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a package above it is absent, or needs one that is
        return False
    ours = spec is not None and ROOT / "kernels" in Path(spec.origin or "").resolve().parents
    return ours if name == OURSELVES else spec is not None


def missing(wanted: Mapping[str, str]) -> list[str]:
    """The modules of `wanted`, and `bnfast.kernels`, that this Python cannot import."""
    lacking = [name for name in wanted if not importable(name)]
    if "torch" in lacking or not importable(OURSELVES):
        lacking.append(OURSELVES)
    return lacking


def usable_torch() -> bool:
    try:
        major, minor, *_ = importlib.metadata.version("torch").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= OLDEST_TORCH


def build(
    folder: Path, installs: Sequence[Sequence[str]], below: Sequence[str] = (), optional: bool = False
) -> Path:
    """Makes an environment that sees the packages in the folders `below` after its own, unless this one was
    finished; one that was cut short is taken up again, and one of another Python is emptied. Returns its
    Python. installs: what pip is told to do; if it is `optional` and fails, the rest goes on."""
    python, mark, version = folder / "bin" / "python", folder / STAMP, "{}.{}".format(*sys.version_info)
    total = hashlib.sha256(repr((ROOT, installs, below)).encode())
    for name in ("setup.py", "pyproject.toml"):
        total.update((ROOT / name).read_bytes())
    finished = [version, total.hexdigest()]
    made = mark.read_text().split() if mark.exists() else []
    if made == finished and python.exists():
        return python
    if not made and folder.exists() and any(folder.iterdir()):
        stop(f"{folder} was not made by this command: start it with that Python, or set BNFAST_VENV.")
    clear = ["--clear"] * bool(made and made[0] != version)
    run(sys.executable, "-m", "venv", *clear, str(folder))
    mark.write_text(version)
    next(folder.rglob("site-packages")).joinpath("packages_below.pth").write_text("\n".join(below) + "\n")
    pip = (str(python), "-m", "pip", "-qq", "--disable-pip-version-check")
    done = [run(*pip, *each, optional=optional) for each in installs]
    run(*pip, *ITSELF)
    if all(done):
        mark.write_text(" ".join(finished))
    return python


def run(*command: str, optional: bool = False) -> bool:
    """Whether a command succeeded. If one fails that is not optional, this ends the program."""
    say(shorten(" ".join(command), 200, placeholder=" ..."))
    if subprocess.call(command, cwd=ROOT) == 0:
        return True
    if not optional:
        stop(
            "that step failed.",
            "Without a network, install what requirements.txt lists by other means, then run",
            "'pip install --no-deps --no-build-isolation -e .' and this command again.",
        )
    say("going on without it.")
    return False


def separate(folder: Path, names: Sequence[str]) -> Path:
    """The Python of an environment of its own, with what these requirement files pin. Torch comes first and
    alone: see requirements.txt."""
    wanted = pins(*names)
    torch = wanted.pop("torch")
    return build(folder, [(*INSTALL, *torch), (*INSTALL, *itertools.chain(*wanted.values()))])


def layered(folder: Path, requirements: Sequence[str], instead: bool = True) -> Path:
    """The Python of an environment like this one, but with `requirements` in place of what it has; if not
    `instead`, beside it, where they can be had."""
    below = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    options = ("--no-deps", "--ignore-installed") if instead else ()
    # Some Pythons put an old setuptools into a new environment, where it would hide the one below.
    installs = [
        ("uninstall", "-y", "setuptools"),
        *([(*INSTALL, *options, *requirements)] if requirements else []),
    ]
    return build(folder, installs, below, optional=not instead)


def completed(folder: Path) -> Path:
    """The Python of an environment like this one, with what this one lacks for either command."""
    names = [TO_TEST[name] for name in missing(TO_TEST) if name != OURSELVES]
    names += [name for name in ("setuptools", "wheel") if not importable(name)]
    return layered(folder, [line for name in names for line in pins("requirements.txt")[name]], instead=False)


def ensure(wanted: Mapping[str, str] = TO_BENCHMARK) -> list[str]:
    """Returns once what is `wanted` can be imported, perhaps in a second start, or names what still cannot.

    VITAL modules are never in that list: without them there is nothing to run, and this ends the program."""
    if sys.version_info < OLDEST_PYTHON:
        here = ".".join(str(part) for part in sys.version_info[:3])
        stop(f"this is Python {here} ({sys.executable}); bnfast needs Python 3.10 or newer.")
    lacking = missing(wanted)
    if not lacking:
        return []
    forbidden = os.environ.get("BNFAST_NO_SETUP") == "1"
    if forbidden or os.environ.get(RESTARTED):
        vital = [name for name in lacking if name in VITAL]
        if vital:
            why = "BNFAST_NO_SETUP=1 is set" if forbidden else f"it is set up already: remove {sys.prefix}"
            stop(f"this Python ({sys.executable}) cannot import {', '.join(vital)}, and {why}.")
        return lacking
    folder = venv_folder()
    if not (folder / STAMP).exists():
        say(f"this Python ({sys.executable}) lacks {', '.join(lacking)}.")
        say(f"Preparing an environment in {folder}: once, some minutes. BNFAST_NO_SETUP=1 prevents it.")
        say("PyTorch, where it is lacking, is the largest part: 0.2 GB without CUDA, about 3 GB with it.")
    python = str(completed(folder) if usable_torch() else separate(folder, ["requirements.txt"]))
    sys.stdout.flush()
    os.execve(python, [python, *sys.orig_argv[1:]], {**os.environ, RESTARTED: python})
