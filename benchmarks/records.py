"""One CSV schema for everything that is measured or predicted: a line is one figure of one thing.

A column that does not apply is empty, never 0. Tables and pictures are made from these files alone, as pandas
reads them: text columns hold "" and number columns NaN where nothing applies."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

MEASURED, PREDICTED, CANNOT = "measured", "predicted", "cannot"
Number = float | None


@dataclass(frozen=True)
class Record:
    """kind: "layer", whose shape is its input, "copy", "step", "host", "sweep" or "probe". status: one of the
    three above; `note` says why something CANNOT. variant: who was asked ("bnfast", "torch", ...); ran: who
    computed ("Cudnn", "Native"). cache: "cold" or "warm" L2. mode: "eager" or "graph". direction: "forward",
    "backward", or "step".
    us: the median, us_low and us_high the quartiles of `rounds` samples. floor_bytes: what the work must
    move; GBps: those bytes in that time; copy_GBps: measured in the same run, of a copy's bytes both ways.
    copied_MB: what the variant copied beside the work. registers: a thread; in_flight_KB: an SM. Executed:
    instructions a thread for 16 bytes; sector_MB: in 32-byte sectors, wherever they come from; kwavefronts:
    thousands, of shared memory; barriers: of the program that has most; round_trips: how often programs that
    finalize wait for memory, each time after the last.
    loss_apart: of a training's losses from torch.nn's, relative; loss_allowed: how far they may be apart."""

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
    instructions: Number = None
    sector_MB: Number = None
    kwavefronts: Number = None
    barriers: int | None = None
    round_trips: int | None = None
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


HEADERS = [field.name for field in fields(Record)]
NUMBERS = [field.name for field in fields(Record) if field.type != "str"]


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """As `read` has them."""
    found = pd.DataFrame([asdict(record) for record in records], columns=HEADERS)
    return found.astype(dict.fromkeys(NUMBERS, float))


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds lines to a file, which is made with its header if it is not there: what was measured stays."""

    def exact(value: float) -> str:
        return repr(float(value)).removesuffix(".0")

    frame(records).to_csv(path, mode="a", header=not path.exists(), index=False, float_format=exact)


def is_ours(path: Path) -> bool:
    """Whether a CSV file has this schema."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n").split(",") == HEADERS


def read(path: Path) -> pd.DataFrame:
    """The lines of a file. ValueError for one that is not of this schema. A last line that is cut off, as a
    run that was killed leaves it, is left out with a warning."""
    if not is_ours(path):
        raise ValueError(f"{path}: its columns are not those of a benchmark's CSV")
    text, _, rest = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    if rest:
        warnings.warn(f"{path}: its last line is cut off, and left out", stacklevel=2)
    options = {"keep_default_na": False, "na_values": dict.fromkeys(NUMBERS, "")}
    kinds = dict.fromkeys(HEADERS, str) | dict.fromkeys(NUMBERS, float)
    try:
        found = pd.read_csv(io.StringIO(text), dtype=kinds, engine="python", **options)
    except ValueError as e:  # as pandas' own errors are
        raise ValueError(f"{path}: it cannot be read: {e}") from None
    short = found[HEADERS[-1]].isna()
    if short.any():
        raise ValueError(f"{path}: line {short.idxmax() + 2} is too short")
    return found


def load(paths: Sequence[Path]) -> pd.DataFrame:
    """Of files, and of all CSV files of this schema in folders; other tables may lie beside them. ValueError
    if there is none."""
    found: list[pd.DataFrame] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        inside = [file for file in sorted(path.rglob("*.csv")) if file.is_file() and is_ours(file)]
        found += map(read, inside if path.is_dir() else [path])
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no benchmark's CSV file in there")
    return pd.concat(found, ignore_index=True)
