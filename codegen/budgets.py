"""What kernels may take, as committed in budgets.csv: read, renewed, and held against what is counted now.

A line is one kernel of one layer and direction. All but launches and bytes is of a version of Triton, and has
a column for each that the static tests run."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pandas as pd

from bnfast import dispatch
from codegen.cases import Case

if TYPE_CHECKING:
    from codegen.launches import Launched

PATH = Path(__file__).with_name("budgets.csv")
RENEW = "python3 -m codegen --write"
KEY = ["case", "direction", "kernel"]
# Registers a thread; KB that an SM of an H200 waits for at a time; bytes of the average load. Executed:
# instructions a thread for 16 bytes; 32-byte sectors, wavefronts of shared memory and barriers of a program;
# and how often the program that finalizes waits for memory, each time after the last.
REGISTERS, IN_FLIGHT, LOAD, INSTRUCTIONS, SECTORS, WAVEFRONTS, BARRIERS, ROUND_TRIPS = OF_CODE = (
    "registers", "KB in flight", "bytes a load",
    "instructions", "sectors", "wavefronts", "barriers", "round trips",
)  # fmt: skip
FRACTIONS = IN_FLIGHT, LOAD, INSTRUCTIONS
MORE_IS_BETTER = IN_FLIGHT, LOAD


def versions(lines: pd.DataFrame) -> list[str]:
    """The Tritons whose code the lines have figures of."""
    return sorted(name.removeprefix(f"{REGISTERS} ") for name in lines if name.startswith(REGISTERS))


def table(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines by their keys, with their columns in order and of their types."""
    types = {"launches": "int64", "bytes": "int64"}
    for what in OF_CODE:
        types |= {f"{what} {v}": "float64" if what in FRACTIONS else "Int64" for v in versions(lines)}
    return lines.set_index(KEY)[[*types]].astype(types)


def read() -> pd.DataFrame:
    return table(pd.read_csv(PATH))


def lines(case: Case, launched: dict[str, list[Launched]]) -> pd.DataFrame:
    """The lines of a case as they are now, of the Triton that runs."""
    names = [*KEY, "launches", "bytes", *(f"{what} {dispatch.TRITON_VERSION}" for what in OF_CODE)]
    found = []
    for direction, several in launched.items():
        for each in several:
            code, done = each.report, each.counts
            found.append((
                str(case), direction, each.kernel, 1, each.bytes, code.registers,
                round(each.in_flight / 1024, 1), round(fmean(code.streamed.elements()), 1),
                round(each.instructions, 1), round(done.sectors), round(done.wavefronts), done.barriers,
                done.final_round_trips,
            ))  # fmt: skip
    return table(pd.DataFrame(found, columns=names))


def renewed(now: pd.DataFrame, budget: pd.DataFrame) -> pd.DataFrame:
    """The lines to write: those of now, with what the budget knows of other Tritons."""
    return table(now.combine_first(budget).reindex(now.index).reset_index())


def changes(now: pd.DataFrame, budget: pd.DataFrame) -> pd.DataFrame:
    """The figures that are not the budget's, in the cases of `now`: by key and figure, what each `was` (NaN
    where the budget has none), what it is `now`, and whether that is `worse`. Figures of a Triton that the
    budget knows nothing of are not compared; of a kernel that is gone only the launches are."""
    known = budget[budget.index.isin(now.index.unique("case"), level="case")]
    every = now.index.union(known.index, sort=False)

    def figures(lines: pd.DataFrame) -> pd.Series:
        wide = lines.reindex(every)[[name for name in budget if name in now]].astype(float)
        return wide.fillna({"launches": 0}).rename_axis("figure", axis="columns").stack(future_stack=True)

    found = pd.DataFrame({"was": figures(known), "now": figures(now)})
    found = found[found["now"].notna() & (found["was"] != found["now"])]
    more_is_better = found.index.get_level_values("figure").str.startswith(MORE_IS_BETTER)
    worse = found["was"].isna() | ((found["now"] < found["was"]) == more_is_better)
    return found.assign(worse=worse)


def told(changes: pd.DataFrame) -> list[str]:
    """A line of text for each change."""
    return [
        f"{', '.join(key)}: {figure} was {'not there' if pd.isna(was) else f'{was:,.12g}'}, is {now:,.12g}"
        for (*key, figure), was, now in zip(changes.index, changes["was"], changes["now"], strict=True)
    ]


def complaint(changes: pd.DataFrame) -> str:
    """What to tell whoever made something worse; empty where nothing is."""
    worse = told(changes[changes["worse"]])
    why = f"If that is meant, renew the budgets, under each Triton that they have columns for: {RENEW}"
    return "\n  ".join(["worse than in budgets.csv:", *worse]) + f"\n{why}" if worse else ""
