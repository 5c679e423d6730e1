"""Counts of the two sides of a comparison as lines of a CSV file, tables of ratios, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from benchmarks import model
from benchmarks.cases import columns
from benchmarks.pictures import drawing
from benchmarks.records import MEASURED
from benchmarks.tables import label
from codegen.cases import Case

if TYPE_CHECKING:
    from benchmarks.sides import Side
    from codegen.work import Work

OURS = "bnfast"
ALLOWED = 0.01  # a result's distance from fp64's, relative; rounding to bf16 gives about 0.0017
EQUAL = 0.03  # ratios that are no further from 1 are no difference
MOST = 0.3  # of T: a launch that moves less is not one whose programs are named
READINGS = model.Readings._fields
KEY = ["norm", "groups", "shape", "dtype", "layout", "activation", "residual", "direction"]
SHORT = {"channels_last": "NHWC", "contiguous": "NCHW", "forward": "fwd", "backward": "bwd"}


@dataclass(frozen=True)
class Line:
    """One side of a case in one direction. read_T, written_T: bytes that come from memory and go there at
    least once, in T, the size of x; kept_T: of read_T, what L2 still has; l2_T: what is asked of L2.
    efficiency: the useful share of the sectors that are moved. instructions: of a thread, for 16 bytes of
    read_T and written_T. kwavefronts: thousands, of shared memory. barriers: of the program with the most;
    programs: of the launch with the fewest of those that move much. registers: of a thread, the most; spills:
    instructions and bytes of the stack. model, unstarved, sums: microseconds, as model.Readings has them.
    apart: from fp64, relative, executed at a batch of `checked`."""

    provider: str
    direction: str
    launches: int
    read_T: float
    written_T: float
    kept_T: float
    l2_T: float
    efficiency: float
    instructions: float
    kwavefronts: float
    barriers: int
    programs: int
    registers: int
    spills: int
    float_atomics: int
    model: float
    unstarved: float
    sums: float
    apart: float
    checked: int
    kernels: str


def line(case: Case, side: Side, direction: str) -> Line:
    call, t = side.call[direction], case.x_bytes

    def of_all(what: Callable[[Work], float]) -> float:
        return sum(each.programs * what(each) for each in call)

    read, written = sum(each.read for each in call), sum(each.written for each in call)
    large = [each for each in call if each.read + each.written > MOST * t] or call
    return Line(
        side.name, direction, len(call), read / t, written / t, sum(model.left_in_l2(call)) / t,
        of_all(lambda each: each.fetched) / t,
        # where programs that share a sector take turns, its bytes may count more often than the sector
        min(1.0, of_all(lambda each: each.useful) / of_all(lambda each: each.transferred)),
        of_all(lambda each: each.instructions) * 32 * 16 / (read + written),
        of_all(lambda each: each.wavefronts) / 1e3,
        max(each.barriers for each in call), min(each.programs for each in large),
        max(each.registers for each in call), sum(each.spills for each in call),
        sum(each.float_atomics for each in call), *model.readings(call),
        side.apart.get(direction, float("nan")), side.checked, " ".join(each.kernel for each in call),
    )  # fmt: skip


def frame(case: Case, lines: Sequence[Line]) -> pd.DataFrame:
    """With the columns that say which case it is."""
    own = {name: value for name, value in columns(case).items() if name not in ("kind", "count")}
    return pd.DataFrame([{**own, "groups": case.groups, **asdict(each)} for each in lines])


def launches(case: Case, side: Side, direction: str) -> list[dict[str, Any]]:
    """A row for each launch: what it does, as Work has it, and the parts of its modelled time."""
    call = side.call[direction]
    rows = []
    for work, had in zip(call, model.left_in_l2(call), strict=True):
        counted = {name: value for name, value in vars(work).items() if name not in ("tensors", "final")}
        moved = {"read": work.read, "written": work.written, "kept": had}
        parts = model.of_work(work, had)._asdict()
        which = {"case": str(case), "provider": side.name, "direction": direction}
        rows.append({**which, **counted, **moved, **parts})
    return rows


def timed(found: pd.DataFrame, records: pd.DataFrame) -> pd.DataFrame:
    """With `measured`: microseconds on a GPU, L2 cold, of benchmarks.records' frame; NaN where there are
    none."""
    rows = records[
        (records["status"] == MEASURED) & (records["cache"] == "cold") & (records["mode"] == "eager")
    ]
    rows = rows.assign(provider=rows["variant"].map({OURS: OURS, "compile": "inductor"}), measured=rows["us"])
    own = rows[[*(name for name in KEY if name != "groups"), "provider", "measured"]]
    keys = [name for name in own.columns if name != "measured"]
    return found.merge(own.drop_duplicates(keys, keep="last"), on=keys, how="left")


def compared(found: pd.DataFrame) -> pd.DataFrame:
    """A row for each case, direction and peer, the worst for us first: our columns with _ours, the peer's
    with _peer, and the ratios ours/peer of the three readings."""
    ours = found[found["provider"] == OURS]
    peers = found[found["provider"] != OURS]
    keep = [name for name in found.columns if name not in KEY]
    both = peers[[*KEY, *keep]].merge(ours[[*KEY, *keep]], on=KEY, suffixes=("_peer", "_ours"))
    for name in (*READINGS, *(["measured"] if "measured" in keep else [])):
        both[name] = both[f"{name}_ours"] / both[f"{name}_peer"]
    return both.sort_values("model", ascending=False, kind="stable").reset_index(drop=True)


def _pair(both: pd.DataFrame, name: str, form: str) -> list[str]:
    pairs = both[[f"{name}_ours", f"{name}_peer"]].to_numpy()
    return [f"{ours:{form}}/{peer:{form}}" for ours, peer in pairs]


def named(row: Any) -> str:
    """BN 4 64 x 56x56 relu NHWC fwd"""
    norm = "".join(letter for letter in row.norm if letter.isupper())
    if norm == "LN":
        return f"LN {row.shape} {SHORT[row.direction]}"
    batch = row.shape.partition("x")[0]
    what = label(row.shape, row.residual, row.activation)
    return f"{norm} {batch}x{what} {SHORT[row.layout]} {SHORT[row.direction]}"


def ratios(both: pd.DataFrame) -> pd.DataFrame:
    """The three readings' ratios, and the measured one if there is one; then a/b, ours/peer: the modelled
    microseconds, launches, and bytes."""
    shown = (*READINGS, *(["measured"] if "measured" in both else []))
    return pd.DataFrame({
        "case": [named(row) for row in both.itertuples()], "peer": both["provider_peer"],
        **{name: [f"{value:.2f}" for value in both[name]] for name in shown},
        "us": _pair(both, "model", ".1f"), "launches": _pair(both, "launches", "d"),
        "read T": _pair(both, "read_T", ".1f"), "written T": _pair(both, "written_T", ".1f"),
        "L2 T": _pair(both, "l2_T", ".1f"), "apart": _pair(both, "apart", ".0e"),
    })  # fmt: skip


def counts(both: pd.DataFrame) -> pd.DataFrame:
    """In the same order."""
    return pd.DataFrame({
        "case": [named(row) for row in both.itertuples()],
        "kept T": _pair(both, "kept_T", ".1f"), "effic.": _pair(both, "efficiency", ".2f"),
        "instr": _pair(both, "instructions", ".0f"), "kwavefr": _pair(both, "kwavefronts", ".0f"),
        "barriers": _pair(both, "barriers", "d"), "programs": _pair(both, "programs", "d"),
        "regs": _pair(both, "registers", "d"), "spills": _pair(both, "spills", "d"),
        "atomics": _pair(both, "float_atomics", "d"),
    })  # fmt: skip


def wrong(found: pd.DataFrame) -> list[str]:
    """Whose results are not fp64's, in words."""
    off = found[~(found["apart"] <= ALLOWED)]
    return [f"{row.provider}: {named(row)} is {row.apart:.2g} from fp64" for row in off.itertuples()]


def verdict(both: pd.DataFrame) -> str:
    """ahead N, equal N, behind N"""
    behind, ahead = (both["model"] > 1 + EQUAL).sum(), (both["model"] < 1 - EQUAL).sum()
    return f"ahead {ahead}, equal {len(both) - ahead - behind}, behind {behind}"


def agreed(both: pd.DataFrame) -> int:
    """How many rows are behind by each of the three readings."""
    return int((both[[*READINGS]] > 1 + EQUAL).all(axis=1).sum())


def draw(path: Path, both: pd.DataFrame) -> None:
    """A bar for each row, from 1: its model's ratio, with the other two readings as marks."""
    with drawing(path, 1, 1, figsize=(9, 1.5 + len(both) / 4)) as axis:
        names = [f"{named(row)}, {row.provider_peer}" for row in both.itertuples()]
        colors = ["tab:red" if value > 1 + EQUAL else "tab:blue" for value in both["model"]]
        axis.barh(range(len(both)), both["model"] - 1, left=1, color=colors, height=0.7, label="model")
        for name, mark in zip(READINGS[1:], "ox", strict=True):
            axis.plot(both[name], range(len(both)), mark, color="black", markersize=4, label=name)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(
            yticks=range(len(both)), yticklabels=names, xscale="log",
            xlabel="modelled time, bnfast's over the peer's (nothing is measured)",
        )  # fmt: skip
        axis.invert_yaxis()
        axis.legend()
