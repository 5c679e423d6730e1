"""One CSV schema for everything that is measured or predicted: a line is one figure of one thing.

A column that does not apply is empty, never 0. Tables and pictures are made from these files alone."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path

FEW = 5  # columns that a message names
OF_LAYERS = ("layer", "kernels")  # the kinds whose shape is a layer's input
MEASURED, PREDICTED, CANNOT = "measured", "predicted", "cannot"
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
Number = float | None


@dataclass(frozen=True)
class Record:
    """kind: "layer", "kernels", "copy", "step", "host", "sweep" or "probe". status: one of the three above;
    `note` says why something CANNOT.

    variant: who was asked ("bnfast", "torch", ...); ran: who computed ("Cudnn", "Native"; of "kernels", the
    names of all that were launched).
    cache: "cold" or "warm" L2. mode: "eager" or "graph". direction: "forward", "backward", or "step".
    us: the median, us_low and us_high the quartiles of `rounds` samples. floor_bytes: what the work must
    move; GBps: those bytes in that time; copy_GBps: measured in the same run, of a copy's bytes both ways.
    copied_MB: what the variant copied beside the work. registers: a thread; in_flight_KB: an SM.
    loss_apart: of a training's losses from torch.nn's, relative; loss_allowed: how far they may be (see
    benchmarks.model_losses)."""

    kind: str
    status: str
    variant: str = ""
    ran: str = ""
    suite: str = ""
    network: str = ""
    norm: str = ""
    groups: int | None = None
    shape: str = ""
    dtype: str = ""
    layout: str = ""
    activation: str = ""
    residual: int | None = None
    count: int | None = None
    direction: str = ""
    cache: str = ""
    mode: str = ""
    us: Number = None
    us_low: Number = None
    us_high: Number = None
    rounds: int | None = None
    floor_bytes: int | None = None
    GBps: Number = None
    copy_GBps: Number = None
    launches: Number = None
    peak_MB: Number = None
    copied_MB: Number = None
    registers: int | None = None
    in_flight_KB: Number = None
    host_us: Number = None
    clock_MHz: Number = None
    temperature_C: Number = None
    loss_apart: Number = None
    loss_allowed: Number = None
    note: str = ""
    gpu: str = ""
    driver: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""

    @property
    def x_bytes(self) -> int:
        """T."""
        return prod(map(int, self.shape.split("x"))) * SIZES[self.dtype]


HEADERS = tuple(field.name for field in fields(Record))
_TYPES = {field.name: str(field.type) for field in fields(Record)}


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds lines to a file, which is made with its header if it is not there: what was measured stays."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(HEADERS)
        for record in records:
            writer.writerow(["" if value is None else value for value in asdict(record).values()])


def is_ours(path: Path) -> bool:
    """Whether a CSV file has this schema."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return tuple(next(csv.reader(file), ())) == HEADERS


def read(path: Path) -> list[Record]:
    """The lines of a file. ValueError names what is not of this schema. A last line that is cut off, as a run
    that was killed leaves it, is left out with a warning."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found = tuple(reader.fieldnames or ())
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: it cannot be read as CSV in UTF-8: {e}") from None
    if found != HEADERS:
        unlike = sorted(set(found) ^ set(HEADERS))
        shown = ", ".join(unlike[:FEW]) + f" and {len(unlike) - FEW} more" * (len(unlike) > FEW)
        what = f"they differ in {shown or 'their order'}" if found else "it is empty"
        raise ValueError(f"{path}: its columns are not those of a benchmark's CSV; {what}")
    if lines and None in lines[-1].values():
        warnings.warn(f"{path}: its last line is cut off, and left out", stacklevel=2)
        lines.pop()
    return [_record(path, number, line) for number, line in enumerate(lines, start=2)]


def _record(path: Path, number: int, line: dict[str, str]) -> Record:
    def value(name: str, text: str) -> str | float | int | None:
        if _TYPES[name] == "str":
            return text
        if text == "":
            return None
        return int(text) if "int" in _TYPES[name] else float(text)

    shaped = line["kind"] not in OF_LAYERS or re.fullmatch(r"\d+(x\d+)+", line["shape"] or "")
    if None in line.values() or None in line:
        raise ValueError(f"{path}, line {number}: it has not as many cells as there are columns")
    if not shaped:
        raise ValueError(f"{path}, line {number}: shape is {line['shape']!r}, not sizes as in 4x64x7x7")
    try:
        return Record(**{name: value(name, text) for name, text in line.items()})  # type: ignore[arg-type]
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}, line {number}: {e}") from None
