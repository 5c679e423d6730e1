"""How results are shown and kept: sections, tables that fit a terminal, progress bars, CSV files, folders."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from textwrap import fill
from typing import Protocol

WIDTH = 100  # columns of a terminal
GAP = "  "  # between the columns of a table
RESULTS = Path("benchmark-results")


class Refused(ValueError):
    """What was asked for cannot be done: the command says why and ends with 2, as for a wrong option."""


class Bar(Protocol):
    def update(self, steps: int) -> object: ...


class _Quiet:
    """Stands in for a progress bar where tqdm is not installed."""

    def update(self, steps: int) -> None:
        pass


@contextmanager
def progress(total: int, label: str) -> Iterator[Bar]:
    """A progress bar on stderr, gone when it is done."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"  {label} ...", file=sys.stderr, flush=True)
        yield _Quiet()
        return
    with tqdm(total=total, desc=f"  {label}", ncols=WIDTH - 10, leave=False, file=sys.stderr) as bar:
        yield bar


def section(title: str, text: str = "") -> None:
    print(f"\n{title}\n{'-' * len(title)}")
    if text:
        paragraph(text)


def paragraph(text: str) -> None:
    """Words wrapped to the terminal, then flushed: bars on stderr must not overtake them."""
    print(fill(" ".join(text.split()), WIDTH), flush=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return GAP.join([first, *others]).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def new_folder(parent: Path | None = None) -> Path:
    """A folder for this run, named by date and time; two runs within a second get two folders. Refused where
    none can be made."""
    parent = RESULTS if parent is None else parent
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as e:
            raise Refused(f"argument --out: no folder can be made in {parent}: {e.strerror}") from None
        return folder
    raise FileExistsError(f"{parent / name} and 998 more are there already")


def write_csv(path: Path, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(headers)
        writer.writerows(rows)
