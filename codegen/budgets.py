"""What kernels may take, as committed in budgets.csv: read, written, and held against what is counted now.

A line is one kernel of one layer and direction. Registers, bytes in flight and the width of loads are of a
version of Triton, and have a column for each that the static tests run. Lines with a host ratio are bounds of
tests/static/test_host_time.py: how many times as long as torch's own function a call may keep the host."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("budgets.csv")
RENEW = "python3 -m codegen --write"
FIXED = ("case", "direction", "kernel", "launches", "bytes", "host ratio")
REGISTERS, IN_FLIGHT, LOAD = OF_CODE = ("registers", "KB in flight", "bytes a load")


class Key(NamedTuple):
    case: str
    direction: str
    kernel: str

    def __str__(self) -> str:
        return ", ".join(self)


class Code(NamedTuple):
    """Registers a thread; KB that an SM of an H200 waits for at a time; bytes of the average load."""

    registers: int
    in_flight_KB: float
    load: float


@dataclass(frozen=True)
class Line:
    """code: by version of Triton. bytes, host_ratio: None where the other one is meant."""

    launches: int
    bytes: int | None = None
    host_ratio: float | None = None
    code: Mapping[str, Code] = field(default_factory=dict)


Lines = dict[Key, Line]


class Change(NamedTuple):
    """A figure that is not what the budget has. was: None where that has no such figure."""

    key: Key
    figure: str
    was: float | None
    now: float

    @property
    def worse(self) -> bool:
        if self.was is None:
            return True
        return self.now < self.was if self.figure.startswith((IN_FLIGHT, LOAD)) else self.now > self.was

    def __str__(self) -> str:
        was = "not there" if self.was is None else f"{self.was:,}"
        return f"{self.key}: {self.figure} was {was}, is {self.now:,}"


def changes(now: Lines, budget: Lines) -> list[Change]:
    """What differs in the cases of `now`. The code of a Triton that the budget knows nothing of is not
    compared."""
    known, cases, found = versions(budget), {key.case for key in now}, []
    for key, line in now.items():
        if key not in budget:
            found.append(Change(key, "launches", 0, line.launches))
            continue
        old = budget[key]
        pairs: list[tuple[str, float | None, float | None]] = [
            ("launches", old.launches, line.launches),
            ("bytes", old.bytes, line.bytes),
        ]
        for version in known & line.code.keys():
            was = old.code.get(version)
            for at, figure in enumerate(OF_CODE):
                before = None if was is None else was[at]
                pairs.append((f"{figure} (Triton {version})", before, line.code[version][at]))
        found += [Change(key, what, was, is_) for what, was, is_ in pairs if is_ is not None and was != is_]
    gone = [key for key in budget if key.case in cases and key not in now]
    return found + [Change(key, "launches", budget[key].launches, 0) for key in gone]


def complaint(found: Iterable[Change]) -> str:
    """What to tell whoever made something worse; empty where nothing is."""
    worse = [f"  {change}" for change in found if change.worse]
    if not worse:
        return ""
    why = f"If that is meant, renew the budgets, under each Triton that they have columns for: {RENEW}"
    return "\n".join(["worse than in budgets.csv:", *worse, why])


def renewed(now: Lines, budget: Lines) -> Lines:
    """The lines to write: those of now, with what the budget knows of other Tritons, and its host ratios."""
    lines = {}
    for key, line in now.items():
        known = budget[key].code if key in budget else {}
        lines[key] = dataclasses.replace(line, code={**known, **line.code})
    return lines | {key: line for key, line in budget.items() if line.host_ratio is not None}


def versions(lines: Lines) -> set[str]:
    return {version for line in lines.values() for version in line.code}


def host(function: str, path: Path = PATH) -> tuple[int, float]:
    """(launches, host ratio) of the line that is about torch.nn.functional's `function`."""
    (line,) = (line for key, line in read(path).items() if key.kernel == f"host time over F.{function}")
    assert line.host_ratio is not None, f"{path} has no host ratio beside F.{function}"
    return line.launches, line.host_ratio


def write(path: Path, lines: Lines) -> None:
    order = sorted(versions(lines))
    rows: list[tuple[object, ...]] = [(*FIXED, *(f"{what} {v}" for what in OF_CODE for v in order))]
    for key, line in lines.items():
        found = [line.code.get(version, [None] * len(OF_CODE)) for version in order]
        columns = (code[at] for at in range(len(OF_CODE)) for code in found)
        rows.append((*key, line.launches, line.bytes, line.host_ratio, *columns))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def read(path: Path = PATH) -> Lines:
    """The lines of a file; none where there is no file. ValueError names what is not of this form."""
    if not path.exists():
        return {}
    lines: Lines = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        if tuple(columns[: len(FIXED)]) != FIXED:
            raise ValueError(f"{path}: its columns must begin with {', '.join(FIXED)}, not {columns}")
        known = [name.removeprefix(f"{REGISTERS} ") for name in columns if name.startswith(f"{REGISTERS} ")]
        for number, cells in enumerate(reader, start=2):
            try:
                lines[Key(cells["case"], cells["direction"], cells["kernel"])] = _line(cells, known)
            except (KeyError, TypeError, ValueError) as e:
                raise ValueError(f"{path}, line {number}: {e!r}") from None
    return lines


def _line(cells: dict[str, str], known: list[str]) -> Line:
    code = {
        version: Code(
            int(cells[f"{REGISTERS} {version}"]), *(float(cells[f"{what} {version}"]) for what in OF_CODE[1:])
        )
        for version in known
        if cells[f"{REGISTERS} {version}"]
    }
    ratio = cells["host ratio"]
    return Line(
        int(cells["launches"]),
        int(cells["bytes"]) if cells["bytes"] else None,
        float(ratio) if ratio else None,
        code,
    )
