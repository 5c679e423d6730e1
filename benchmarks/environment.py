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
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 11)
STAMP, LOG = "bnfast-stamp", "bnfast-setup.log"  # files in an environment made here
RESTARTED = "BNFAST_RESTARTED_IN"  # set in the second start, which must not set up again

# What is imported, and what pip calls it. `bnfast.kernels` is this checkout, installed editable.
OURSELVES = "bnfast.kernels"
VITAL = ("torch", "pandas", "tqdm", OURSELVES)  # without these no job runs
TO_RUN: dict[str, str] = {"torch": "torch", "numpy": "numpy"}
if sys.platform == "linux":
    TO_RUN["triton"] = "triton"
TO_BENCHMARK = {
    **TO_RUN,
    "pandas": "pandas",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
}
TO_TEST = {
    **TO_BENCHMARK, "pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "hypothesis": "hypothesis",
    "expecttest": "expecttest", "ruff": "ruff", "mypy": "mypy",
}  # fmt: skip


class Step(NamedTuple):
    """One command of a set-up. If an optional one fails, the rest goes on."""

    title: str
    command: tuple[str, ...]
    optional: bool = False


def say(text: str) -> None:
    print(f"bnfast: {text}", file=sys.stderr, flush=True)


def stop(*lines: str) -> NoReturn:
    for line in lines:
        say(line)
    sys.exit(1)


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_folder() -> Path:
    return Path(os.environ.get("BNFAST_VENV") or ROOT / ".venv").absolute()


def pins(text: str, version: tuple[int, int], system: str) -> dict[str, str]:
    """name -> "name==version" of a requirements file, for a Python version and a `sys.platform`."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        line, _, marker = line.partition("#")[0].partition(";")
        if not line.strip():
            continue
        if "platform_system" in marker and system != "linux":
            continue
        bound = re.search(r'python_version\s*(>=|<)\s*"3\.(\d+)"', marker)
        if bound and (version >= (3, int(bound.group(2)))) != (bound.group(1) == ">="):
            continue
        found[line.split("==")[0].strip()] = line.strip()
    return found


def importable(name: str) -> bool:
    """Whether `name` can be imported; for `bnfast.kernels`: whether that would be this checkout's."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if name != OURSELVES:
        return True
    return ROOT / "kernels" in Path(spec.origin or "").resolve().parents


def missing(wanted: Mapping[str, str]) -> list[str]:
    """The modules of `wanted`, and `bnfast.kernels`, that this Python cannot import."""
    lacking = [name for name in wanted if not importable(name)]
    if "torch" in lacking or not importable(OURSELVES):
        lacking.append(OURSELVES)
    return lacking


def torch_version() -> tuple[int, ...] | None:
    try:
        text = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def decide(lacking: Sequence[str], torch_here: tuple[int, ...] | None) -> str:
    """Whether to "go" with this Python, or to set up an environment: "layered" upon it, or "full"."""
    if not lacking:
        return "go"
    return "layered" if torch_here is not None and torch_here >= OLDEST_TORCH else "full"


def package_folders(path: Sequence[str]) -> list[str]:
    """The folders of installed packages on an import path."""
    return [entry for entry in path if Path(entry).name in ("site-packages", "dist-packages")]


def pip_of(folder: Path) -> tuple[str, ...]:
    return (str(python_of(folder)), "-m", "pip", "--disable-pip-version-check")


def uncover(folder: Path) -> Step:
    """Some Pythons put an old setuptools into a new environment, where it would hide the one below."""
    command = (*pip_of(folder), "uninstall", "-y", "setuptools")
    return Step("what hides the packages below removed", command, optional=True)


def pinned(*names: str) -> dict[str, str]:
    """pins() of requirement files for this Python: the later one counts where two name the same package."""
    found: dict[str, str] = {}
    for name in names:
        found |= pins((ROOT / name).read_text(encoding="utf-8"), sys.version_info[:2], sys.platform)
    return found


def itself(folder: Path) -> Step:
    return Step(
        "bnfast itself", (*pip_of(folder), "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    )


def whole(folder: Path, wanted: Mapping[str, str]) -> list[Step]:
    """The commands that install all of these pins. Torch comes first and alone: see requirements.txt."""
    pip = (*pip_of(folder), "install", "--retries", "2")
    rest = [pin for name, pin in wanted.items() if name != "torch"]
    return [
        Step(f"{wanted['torch']} (0.2 GB without CUDA, about 3 GB with it)", (*pip, wanted["torch"])),
        Step("the rest of requirements.txt", (*pip, *rest)),
        itself(folder),
    ]


def steps(mode: str, folder: Path, lacking: Sequence[str], wanted: Mapping[str, str]) -> list[Step]:
    """The commands that prepare `folder`, in order."""
    known = pinned("requirements.txt")
    if mode == "full":
        return whole(folder, known)
    names = [known[wanted[name]] for name in lacking if name != OURSELVES]
    names += [known[name] for name in ("setuptools", "wheel") if not importable(name)]
    pip = (*pip_of(folder), "install", "--retries", "2")
    extra = [Step(" ".join(names), (*pip, *names), optional=True)] if names else []
    return [uncover(folder), *extra, itself(folder)]


def venv_step(folder: Path) -> Step:
    """The command that makes `folder` an environment of the running Python (emptied, if of another)."""
    settings, clear = folder / "pyvenv.cfg", []
    if settings.exists():
        version = re.search(r"^version\w* = (\d+\.\d+)", settings.read_text(encoding="utf-8"), re.MULTILINE)
        same = version is not None and version.group(1) == "{}.{}".format(*sys.version_info)
        if not same or not python_of(folder).exists():
            if not (folder / LOG).exists():
                stop(f"{folder} is of another Python and was not made here: remove it, or set BNFAST_VENV.")
            clear = ["--clear"]
    return Step(f"the environment {folder}", (sys.executable, "-m", "venv", *clear, str(folder)))


def lay_upon(folder: Path, below: Sequence[str]) -> None:
    """Lets the environment see the packages in the folders `below`, after its own."""
    inside = "Lib" if os.name == "nt" else "lib/python{}.{}".format(*sys.version_info)
    (folder / inside / "site-packages" / "packages_below.pth").write_text("\n".join(below) + "\n")


def run(step: Step, number: str, log: Path) -> bool:
    """Runs one step, its output in `log`, whose end is shown where the step fails."""
    print(f"  [{number}] {step.title} ... ", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        ok = subprocess.call(step.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT) == 0
    print(f"{'done' if ok else 'failed'} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if not ok:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        print("\n".join(f"        | {line}" for line in tail), file=sys.stderr, flush=True)
    return ok


def fingerprint(*extra: str) -> str:
    """Changes with whatever an environment is made from; a finished one carries it as its stamp."""
    total = hashlib.sha256("\0".join([str(ROOT), *extra]).encode())
    for name in ("requirements.txt", "setup.py", "pyproject.toml"):
        total.update((ROOT / name).read_bytes())
    return total.hexdigest()


def build(folder: Path, todo: Sequence[Step], below: Sequence[str], stamp: str) -> None:
    """Runs a set-up, unless one with this stamp was finished; one that was cut short is taken up again."""
    mark = folder / STAMP
    if mark.exists() and mark.read_text() == stamp and python_of(folder).exists():
        return
    steps, whole = [venv_step(folder), *todo], True
    folder.mkdir(parents=True, exist_ok=True)
    if mark.exists():
        mark.unlink()
    try:
        for number, step in enumerate(steps, 1):
            if not run(step, f"{number}/{len(steps)}", folder / LOG):
                if not step.optional:
                    stop(
                        f"that step failed; its full output is in {folder / LOG}.",
                        "Without a network, install what requirements.txt lists by other means, then run",
                        "'pip install --no-deps --no-build-isolation -e .' and this command again.",
                    )
                say("going on without it.")
                whole = False
            if number == 1:
                lay_upon(folder, below)
    except KeyboardInterrupt:
        stop("set-up interrupted. The same command takes it up again.")
    if whole:
        mark.write_text(stamp)


def separate(folder: Path, *names: str) -> Path:
    """The Python of an environment of its own, with what these requirement files pin."""
    wanted = pinned(*names)
    build(folder, whole(folder, wanted), [], fingerprint(*wanted.values()))
    return python_of(folder)


def layered(folder: Path, requirements: Sequence[str]) -> Path:
    """The Python of an environment like this one, but with `requirements` in place of what it has."""
    pip = (*pip_of(folder), "install", "--no-deps")
    install = Step(" ".join(requirements), (*pip, "--ignore-installed", *requirements))
    below = package_folders(sys.path)
    build(folder, [uncover(folder), install, itself(folder)], below, fingerprint(*requirements, *below))
    return python_of(folder)


def restart(python: Path) -> NoReturn:
    """The same command again, in another Python."""
    command = [str(python), *sys.orig_argv[1:]]
    sys.stdout.flush()
    environment = {**os.environ, RESTARTED: str(python)}
    if os.name == "nt":
        sys.exit(subprocess.call(command, env=environment))
    os.execve(command[0], command, environment)


def ensure(wanted: Mapping[str, str] = TO_BENCHMARK) -> list[str]:
    """Returns once what is `wanted` can be imported, perhaps in a second start, or names what still cannot.

    VITAL modules are never in that list: without them there is nothing to run, and this ends the program."""
    if sys.version_info < OLDEST_PYTHON:
        here = ".".join(str(part) for part in sys.version_info[:3])
        stop(
            f"this is Python {here} ({sys.executable}); bnfast needs Python 3.10 or newer.",
            "Name a newer one, such as: python3.12 -m benchmarks",
        )
    lacking = missing(wanted)
    if not lacking:
        return []
    asked_not_to = os.environ.get("BNFAST_NO_SETUP") == "1"
    if asked_not_to or os.environ.get(RESTARTED):
        vital = [name for name in lacking if name in VITAL]
        if vital:
            stop(
                f"this Python ({sys.executable}) cannot import {', '.join(vital)},",
                "and BNFAST_NO_SETUP=1 is set." if asked_not_to else f"though set up: remove {sys.prefix}.",
            )
        return lacking
    folder, mode = venv_folder(), decide(lacking, torch_version())
    below = package_folders(sys.path) if mode == "layered" else []
    if not (folder / STAMP).exists():
        say(f"this Python ({sys.executable}) lacks {', '.join(lacking)}.")
        say(f"Preparing an environment in {folder}: once, some minutes. BNFAST_NO_SETUP=1 prevents it.")
    # with what either command wants: the environment serves both
    build(folder, steps(mode, folder, missing(TO_TEST), TO_TEST), below, fingerprint())
    restart(python_of(folder))
