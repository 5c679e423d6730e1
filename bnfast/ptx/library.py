"""The executor's C code as a loaded library, compiled once, with the C compiler that Triton needs too."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("executor.c", "memory.c", "executor.h", "opcodes.h", "values.h")
HERE = Path(__file__).parent
# -ffp-contract=off: what PTX rounds twice must not become one fused operation here
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
)


class MissingCompiler(RuntimeError):
    """There is no C compiler, or it cannot compile the executor, or there is no place for what it makes."""


def compiler() -> list[str]:
    """The C compiler that Triton would take, and its arguments: CC, which may have some, if that is set."""
    if named := os.environ.get("CC"):
        for name, *arguments in ([named], shlex.split(named)):
            if path := shutil.which(name):
                return [path, *arguments]
        raise MissingCompiler(
            f"executing PTX needs a C compiler, and CC={named} names none: unset or correct it"
        )
    for name in ("gcc", "clang", "cc"):
        if path := shutil.which(name):
            return [path]
    raise MissingCompiler("executing PTX needs a C compiler: install gcc or clang, or name one in CC")


def processor() -> str:
    """What the compiler makes the code for: a home folder may be that of several machines."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


@functools.cache
def load() -> ctypes.CDLL:
    """The library, from the cache if these sources have been compiled before."""
    command = [*compiler(), *FLAGS]
    digest = hashlib.sha256(" ".join([*command, processor()]).encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnfast"
    library = folder / f"ptx-{digest.hexdigest()[:16]}.so"
    try:
        if not library.exists():
            _compile(command, library)
        try:
            loaded = ctypes.CDLL(str(library))
        except OSError:  # such as a file that a full disk has cut short
            _compile(command, library)
            loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise MissingCompiler(
            f"the executor of PTX cannot be kept in {folder}, or not loaded from there: {error}. Name a "
            "folder that can be written, and whose files may be executed, in XDG_CACHE_HOME"
        ) from error
    loaded.execute.restype = ctypes.c_int64
    return loaded


def _compile(command: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    # Another process may compile it at the same time: each renames a file of its own.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        sources = [str(HERE / name) for name in SOURCES if name.endswith(".c")]
        command = [*command, "-o", str(made), *sources, "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise MissingCompiler(f"{command[0]}, the C compiler, cannot be run: {error}") from error
        if done.returncode:
            raise MissingCompiler(f"{command[0]} cannot compile the executor of PTX:\n{done.stderr[-2000:]}")
        made.replace(library)
