"""What kernels may take, as committed in budgets.csv: read, written, and held against what is counted now.

A line is one kernel of one layer and direction. Registers, bytes in flight and the width of loads are of a
version of Triton, and have a column for each that the static tests run. Lines with a host ratio are bounds of
tests/static/test_host_time.py: how many times as long as torch's own function a call may keep the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

PATH = Path(__file__).with_name("budgets.csv")
RENEW = "python3 -m codegen --write"
KEY = ["case", "direction", "kernel"]
# Registers a thread; KB that an SM of an H200 waits for at a time; bytes of the average load.
REGISTERS, IN_FLIGHT, LOAD = OF_CODE = ("registers", "KB in flight", "bytes a load")


def versions(lines: pd.DataFrame) -> list[str]:
    """The Tritons whose code the lines have figures of."""
    found = (name.removeprefix(f"{REGISTERS} ") for name in lines if name.startswith(REGISTERS))
    return sorted(found)


def table(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines by their keys, which must be unique, with their columns in order and of their types."""
    code = [f"{what} {version}" for what in OF_CODE for version in versions(lines)]
    types = {"launches": "int64", "bytes": "Int64", "host ratio": "float64"}
    types |= {name: "Int64" if name.startswith(REGISTERS) else "float64" for name in code}
    keyed = lines.set_index(KEY)
    if not keyed.index.is_unique:
        raise ValueError(f"more than one line is about {keyed.index[keyed.index.duplicated()].to_list()}")
    return keyed.reindex(columns=list(types)).astype(types)


def read(path: Path = PATH) -> pd.DataFrame:
    """The lines of a file. ValueError if they are not of this form."""
    try:
        return table(pd.read_csv(path))
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is no table of budgets: {e}") from None


def write(path: Path, lines: pd.DataFrame) -> None:
    lines.to_csv(path, lineterminator="\n")


def renewed(now: pd.DataFrame, budget: pd.DataFrame) -> pd.DataFrame:
    """The lines to write: those of now, with what the budget knows of other Tritons, and its host ratios."""
    lines = now.combine_first(budget[budget.index.isin(now.index)])
    hosts = budget[budget["host ratio"].notna()]
    return table(pd.concat([lines.reindex(now.index), hosts]).reset_index())


def changes(now: pd.DataFrame, budget: pd.DataFrame) -> pd.DataFrame:
    """The figures that are not the budget's, in the cases of `now`: by key and figure, what each `was` (NaN
    where the budget has none), what it is `now`, and whether that is `worse`. Figures of a Triton that the
    budget knows nothing of are not compared; of a kernel that is gone only the launches are."""
    known = budget[budget.index.isin(now.index.unique("case"), level="case")]
    every = now.index.union(known.index, sort=False)

    def figures(lines: pd.DataFrame) -> Any:
        wide = lines.reindex(every)[[name for name in budget if name in now and name != "host ratio"]]
        long = wide.astype(float).fillna({"launches": 0}).melt(var_name="figure", ignore_index=False)
        return long.set_index("figure", append=True)["value"]

    found = pd.DataFrame({"was": figures(known), "now": figures(now)})
    found = found[found["now"].notna() & (found["was"] != found["now"])]
    more_is_better = found.index.get_level_values("figure").str.startswith((IN_FLIGHT, LOAD))
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


def host(function: str) -> tuple[int, float]:
    """(launches, host ratio) of the line that is about torch.nn.functional's `function`."""
    line = read().xs(f"host time over F.{function}", level="kernel").squeeze()
    return int(line["launches"]), float(line["host ratio"])
