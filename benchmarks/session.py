"""What all jobs share: where results go, what this machine has, what came of each part, what is printed."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

import bnfast
from benchmarks import RESULTS, Refused, timing
from bnfast import dispatch

WIDTH = 100  # columns of a terminal

# a bar on stderr, gone when it is done; none where that is a file
progress: Callable[..., Any] = partial(tqdm, ncols=WIDTH - 10, leave=False, file=sys.stderr, disable=None)


def section(title: str, text: str = "") -> None:
    print(f"\n{title}\n{'-' * len(title)}")
    if text:
        paragraph(text)


def paragraph(text: str) -> None:
    """Words wrapped to the terminal, then flushed: bars on stderr must not overtake them."""
    print(fill(" ".join(text.split()), WIDTH), flush=True)


def as_text(table: pd.DataFrame) -> str:
    """The first column to the left, the others to the right, each as wide as it needs to be."""
    first, *_ = table.columns
    rows = table.set_index(first).rename_axis(index=None, columns=first)
    return "\n".join(line.rstrip() for line in rows.to_string().splitlines())


@dataclass
class Session:
    """One run: where its files go, what cannot be imported, and the line for each part in the summary."""

    folder: Path
    device: torch.device
    lacking: list[str]
    start: float = field(default_factory=time.monotonic)
    summary: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return timing.is_gpu(self.device)

    def note(self, part: str, state: str, text: str) -> None:
        """`state`: PASS, FAIL, DONE (nothing to judge) or NOT RUN."""
        self.summary.append((part, state, text))
        paragraph(f"{state}: {text}")

    def cannot(self, part: str, *needed: str) -> bool:
        """Whether something a part needs is not installed; says so."""
        absent = [name for name in needed if name in self.lacking]
        if absent:
            self.note(part, "NOT RUN", f"this Python lacks {', '.join(absent)}")
        return bool(absent)

    def draw(self, picture: Callable[[], object]) -> None:
        if "matplotlib" not in self.lacking:
            picture()

    def why_plain_torch(self) -> str | None:
        return dispatch.reason_for_torch(torch.empty(2, 8, 2, 2, device=self.device))

    def close(self) -> int:
        """Prints the summary. Returns 1 if anything disagreed, else 0; a part that could not run is only
        named."""
        section("Summary")
        if "matplotlib" in self.lacking:
            self.summary.append(("pictures", "NOT RUN", "this Python lacks matplotlib"))
        width = max((len(name) for name, *_ in self.summary), default=0)
        for name, state, text in self.summary:
            print(f"{state:<8} {name:<{width}} {text}")
        seconds = time.monotonic() - self.start
        print(f"\n{seconds:.0f} s. Tables (CSV) and pictures (PNG) are in {self.folder}")
        return int(any(state == "FAIL" for _, state, _ in self.summary))


def device_of(asked: str | None) -> torch.device:
    """A GPU with its number, which torch.cuda.set_device needs; asked: None for a GPU if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = {f"cuda:{number}": torch.device("cuda", number) for number in range(count)}
    known = {**gpus, "cuda": gpus["cuda:0"]} if gpus else {}
    known["cpu"] = torch.device("cpu")
    asked = asked or ("cuda" if gpus else "cpu")
    if asked not in known:
        raise Refused(f"argument --device: {asked!r} is not one of {', '.join(known)}")
    return known[asked]


def new_folder(parent: Path | None = None) -> Path:
    """A folder for this run, named by date and time. Refused where none can be made."""
    folder = (parent or RESULTS) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise Refused(f"argument --out: no folder can be made in {folder.parent}: {e.strerror}") from None
    return folder


def begin(options: argparse.Namespace, lacking: list[str], title: str) -> Session:
    """A session as the options --device and --out want it, on a machine that is named first."""
    device = device_of(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    session = Session(new_folder(options.out), device, lacking)
    print(title)
    section("This machine")
    gpu = torch.cuda.get_device_name(device) if session.gpu else "no GPU in use"
    versions = f"bnfast {bnfast.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}; {gpu}")
    why = session.why_plain_torch()
    ours = f"plain torch: {why}" if why else "the Triton kernels"
    paragraph(f"Here bnfast's layers run {ours}.")
    return session
