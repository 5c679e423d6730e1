"""Records as tables for a terminal: a row for each case, and one for all layers of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks import report
from benchmarks.records import CANNOT, MEASURED, PREDICTED, Record

COPY_RATE = 4.3e12  # bytes a second: assumed for an H200, and measured by nobody here
FLOOR_LABEL = f"floor at {COPY_RATE / 1e12:.1f} TB/s, an assumption: the copy rate of an H200"
BASELINES_A_TABLE = 4  # what fits a terminal
CODE = ("regs", "KB in flight")  # columns that need compiled kernels
Table = tuple[tuple[str, ...], list[list[str]]]  # headers and rows


@dataclass(frozen=True)
class Key:
    """What a case is, in the columns of a record."""

    network: str
    norm: str
    groups: int | None
    shape: str
    dtype: str
    layout: str
    activation: str
    residual: int | None

    @classmethod
    def of(cls, record: Record) -> Key:
        return cls(**{name: getattr(record, name) for name in cls.__dataclass_fields__})

    @property
    def label(self) -> str:
        """64 x 56x56 + z relu"""
        _, channels, *size = self.shape.split("x")
        after = " + z" * bool(self.residual) + f" {self.activation}" * bool(self.activation)
        return f"{channels} x {'x'.join(size) or '1'}{after}"


@dataclass(frozen=True)
class Selection:
    """Records of one kind of measurement, found by case and by who was measured."""

    records: Sequence[Record]

    @property
    def keys(self) -> list[Key]:
        """In the order in which they first occur."""
        return list(dict.fromkeys(Key.of(record) for record in self.records))

    @property
    def variants(self) -> list[str]:
        """Ours first."""
        names = dict.fromkeys(record.variant for record in self.records)
        return sorted(names, key=lambda name: name != "bnfast")

    def where(self, **columns: str) -> Selection:
        def fits(record: Record) -> bool:
            return all(getattr(record, name) == value for name, value in columns.items())

        return Selection([record for record in self.records if fits(record)])

    def one(self, key: Key, variant: str) -> Record | None:
        """The last one, if there are several: a later run replaces an earlier one."""
        found = [r for r in self.records if r.variant == variant and Key.of(r) == key]
        return found[-1] if found else None

    def total(self, variant: str) -> float | None:
        """Microseconds of all layers; None if one is not there."""
        found = [self.one(key, variant) for key in self.keys]
        if not found or any(record is None or record.us is None for record in found):
            return None
        return sum((record.us or 0.0) * (record.count or 1) for record in found if record)


def floor(moved: float) -> float:
    """Microseconds that moving so many bytes takes at the assumed copy rate."""
    return moved / COPY_RATE * 1e6


def predicted(records: Iterable[Record]) -> Table:
    """Counted, without a GPU; forward and backward as a/b. The last row is of all layers: the sums, but the
    most registers and the fewest bytes in flight. These two are left out where they are not known of any."""
    ours = Selection([r for r in records if r.status == PREDICTED])
    headers = (
        "C x size",
        "layers",
        "T MB",
        "fwd MB",
        "bwd MB",
        "runs",
        "regs",
        "KB in flight",
        "floor us",
    )
    forwards, backwards = (ours.where(direction=direction) for direction in ("forward", "backward"))
    rows, pairs = [], []
    for key in ours.keys:
        forward, backward = forwards.one(key, "bnfast"), backwards.one(key, "bnfast")
        if forward and backward:
            pairs.append((forward, backward))
            layers = str(forward.count)
            rows.append([key.label, layers, *_counted([(forward, backward)], [1])])
    if rows:
        counts = [forward.count or 1 for forward, _ in pairs]
        rows.append(["all", str(sum(counts)), *_counted(pairs, counts)])
    known = [i for i, name in enumerate(headers) if name not in CODE or any(row[i] != "-" for row in rows)]
    return tuple(headers[i] for i in known), [[row[i] for i in known] for row in rows]


def _counted(pairs: Sequence[tuple[Record, Record]], counts: Sequence[int]) -> list[str]:
    """T and what follows, of one case or of several."""

    def total(way: int, name: str) -> float:
        return sum((getattr(pair[way], name) or 0) * n for pair, n in zip(pairs, counts, strict=True))

    def extreme(name: str, choose: Callable[[list[float]], float]) -> str:
        found = [[getattr(pair[way], name) for pair in pairs] for way in (0, 1)]
        if any(value is None for way in found for value in way):
            return "-"
        return "/".join(f"{choose(way):.0f}" for way in found)

    forward, backward = total(0, "floor_bytes"), total(1, "floor_bytes")
    return [
        f"{total(0, 'x_bytes') / 1e6:.1f}",
        f"{forward / 1e6:.0f}",
        f"{backward / 1e6:.0f}",
        f"{total(0, 'launches'):.0f}+{total(1, 'launches'):.0f}",
        extreme("registers", max),
        extreme("in_flight_KB", min),
        "/".join(f"{us:.0f}" if us >= 10 else f"{us:.1f}" for us in map(floor, (forward, backward))),
    ]


def measured(records: Iterable[Record], direction: str) -> list[Table]:
    """Ours in microseconds with L2 cold and warm and as a share of the copy rate of the same run; how many
    times as long each of the others takes, L2 cold. More than one table if there are many others."""
    found = Selection([r for r in records if r.status == MEASURED and r.kind == "layer"])
    found = found.where(direction=direction, mode="graph" if direction == "both" else "eager")
    cold, warm = found.where(cache="cold"), found.where(cache="warm")
    others = [name for name in cold.variants if name != "bnfast"]
    parts = [others[i : i + BASELINES_A_TABLE] for i in range(0, len(others), BASELINES_A_TABLE)]
    return [_measured(cold, warm, part) for part in parts or [[]]]


def _measured(cold: Selection, warm: Selection, others: Sequence[str]) -> Table:
    headers = ("C x size", "layers", "us", "GB/s", "% of copy", "warm us", *(f"{name} x" for name in others))
    rows = []
    for key in cold.keys:
        ours, again = cold.one(key, "bnfast"), warm.one(key, "bnfast")
        ratios = [_ratio(cold.one(key, name), ours) for name in others]
        count = next(str(r.count) for r in cold.records if Key.of(r) == key)
        rows.append([key.label, count, _us(ours), _rate(ours), _share(ours), _us(again), *ratios])
    if rows:
        mine, theirs = cold.total("bnfast"), [cold.total(name) for name in others]
        ratios = [f"{total / mine:.2f}" if total and mine else "-" for total in theirs]
        totals = [f"{total:.0f}" if total else "-" for total in (mine, warm.total("bnfast"))]
        rows.append(["all layers", str(_layers(cold)), totals[0], "", "", totals[1], *ratios])
    return headers, rows


def _layers(found: Selection) -> int:
    first = {Key.of(record): record.count or 1 for record in found.records}
    return sum(first.values())


def _us(record: Record | None) -> str:
    return "-" if record is None or record.us is None else f"{record.us:.1f}"


def _rate(record: Record | None) -> str:
    return f"{record.GBps:.0f}" if record and record.GBps else "-"


def _share(record: Record | None) -> str:
    if record is None or not record.GBps or not record.copy_GBps:
        return "-"
    return f"{100 * record.GBps / record.copy_GBps:.0f}"


def _ratio(theirs: Record | None, ours: Record | None) -> str:
    if theirs is None or ours is None or not theirs.us or not ours.us:
        return "-"
    return f"{theirs.us / ours.us:.2f}"


def refusals(records: Iterable[Record]) -> list[str]:
    """Who could not run what, and why: a line for each reason."""
    reasons = Counter((r.variant, r.note) for r in records if r.status == CANNOT)
    return [f"{variant}: {note} ({n} of them)" for (variant, note), n in reasons.items()]


def who_ran(records: Iterable[Record]) -> list[str]:
    """What each variant's name stands for, as it really ran."""
    ran: dict[str, set[str]] = {}
    for record in records:
        if record.status == MEASURED and record.kind == "layer" and record.ran:
            ran.setdefault(record.variant, set()).add(record.ran)
    return [f"{variant}: {', '.join(sorted(names))}" for variant, names in ran.items()]


PLAIN_HEADERS = ("what", "size", "where", "us", "GB/s", "peak MB", "note")


def plain(found: Iterable[Record]) -> list[list[str]]:
    """A line a record, for what is no layer: bandwidths, probes, training steps, tile sweeps."""
    rows = [
        [
            r.variant, r.shape or r.ran, " ".join(filter(None, [r.direction, r.cache, r.mode])),
            _us(r) if r.host_us is None else f"{r.host_us:.1f}",
            _rate(r), f"{r.peak_MB:.0f}" if r.peak_MB else "-", r.note,
        ]
        for r in found
    ]  # fmt: skip
    # a note has what the others leave; the CSV file has all of it
    others = [max(map(len, column)) for column in zip(PLAIN_HEADERS, *rows, strict=True)][:-1]
    room = max(len("note"), report.WIDTH - sum(others) - len(report.GAP) * len(others))
    return [[*row, note if len(note) <= room else note[: room - 3] + "..."] for *row, note in rows]
