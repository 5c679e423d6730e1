"""What all jobs share: where results go, what this machine has, what came of each part, and the summary."""

from __future__ import annotations

import argparse
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import bnfast
from benchmarks import report
from bnfast import dispatch


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
        return self.device.type == "cuda"

    def note(self, part: str, state: str, text: str) -> None:
        """`state`: PASS, FAIL, DONE (nothing to judge) or NOT RUN."""
        self.summary.append((part, state, text))
        report.paragraph(f"{state}: {text}")

    def cannot(self, part: str, *needed: str) -> bool:
        """Whether something a part needs is not installed; says so."""
        absent = [name for name in needed if name in self.lacking]
        if absent:
            self.note(part, "NOT RUN", f"this Python lacks {', '.join(absent)}")
        return bool(absent)

    def draw(self, picture: Callable[[], None]) -> None:
        if "matplotlib" not in self.lacking:
            picture()

    def why_plain_torch(self) -> str | None:
        return dispatch.reason_for_torch(torch.empty(2, 8, 2, 2, device=self.device))

    def close(self) -> int:
        """Prints the summary. Returns 1 if anything disagreed, else 0; a part that could not run is only
        named."""
        report.section("Summary")
        if "matplotlib" in self.lacking:
            self.summary.append(("pictures", "NOT RUN", "this Python lacks matplotlib"))
        width = max((len(name) for name, *_ in self.summary), default=0)
        for name, state, text in self.summary:
            print(f"{state:<8} {name:<{width}} {text}")
        failed = any(state == "FAIL" for _, state, _ in self.summary)
        seconds = time.monotonic() - self.start
        print(f"\n{seconds:.0f} s. Tables (CSV) and pictures (PNG) are in {self.folder}")
        return int(failed)


def device_of(asked: str | None) -> torch.device:
    """A GPU with its number, which torch.cuda.set_device needs; asked: None for a GPU if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None:
        asked = "cuda" if count else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", asked)
    number = int((found and found.group(1)) or 0)
    if found is None or (asked != "cpu" and number >= count):
        raise report.Refused(
            f'argument --device: {asked!r} is not "cpu" or a GPU of this machine '
            f'("cuda", "cuda:1", ...), which has {count}'
        )
    return torch.device("cpu") if asked == "cpu" else torch.device("cuda", number)


def begin(options: argparse.Namespace, lacking: list[str], title: str) -> Session:
    """A session as the options --device and --out want it, on a machine that is named first."""
    device = device_of(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    session = Session(report.new_folder(options.out), device, lacking)
    print(title)
    report.section("This machine")
    gpu = torch.cuda.get_device_name(device) if session.gpu else "no GPU in use"
    versions = f"bnfast {bnfast.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}; {gpu}")
    why = session.why_plain_torch()
    ours = f"plain torch: {why}" if why else "the Triton kernels"
    report.paragraph(f"Here bnfast's layers run {ours}.")
    return session
