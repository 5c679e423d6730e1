"""`python3 -m codegen`: what the kernels take now, beside budgets.csv; with --write, that file is renewed.

It needs what `python3 -m tests` installs, and no GPU."""

from __future__ import annotations

import argparse
import sys

import pandas as pd
from tqdm import tqdm

from bnfast import dispatch
from codegen import budgets, why_not_compiled
from codegen.budgets import IN_FLIGHT, LOAD, REGISTERS
from codegen.cases import CASES

ABOUT = """\
Launches and bytes (MB) of a layer's kernels, registers a thread, KB that an SM waits for at a time, and bytes
of the average load, counted from plan and machine code for an H200. Where a figure is not its budget:
budget -> now."""
NAME_WIDTH = 34
COLUMNS = {  # figure: (title, width, unit, format)
    "launches": ("runs", 8, 1, ".0f"),
    "bytes": ("MB", 18, 1e6, ".1f"),
    REGISTERS: ("registers", 12, 1, ".0f"),
    IN_FLIGHT: ("KB", 16, 1, ".1f"),
    LOAD: ("a load", 14, 1, ".1f"),
}


def show(now: pd.DataFrame, changes: pd.DataFrame) -> None:
    """now: with figures of one Triton."""
    was = changes["was"].to_dict()
    titles = "".join(title.ljust(width) for title, width, _, _ in COLUMNS.values())
    print(f"{'kernel':{NAME_WIDTH}}{titles}".rstrip())
    for case, lines in now.groupby(level="case", sort=False):
        print(case)
        for key, line in lines.iterrows():
            shown = f"  {key[1]} {key[2].removesuffix('_kernel')}".ljust(NAME_WIDTH)
            for (figure, value), (_, width, unit, form) in zip(line.items(), COLUMNS.values(), strict=True):
                before = was.get((*key, figure))
                arrow = "" if before is None else f"{before / unit:{form}} -> "
                shown += f"{arrow}{value / unit:{form}}".ljust(width)
            print(shown.rstrip())
    for change in budgets.told(changes[changes["now"] == 0]):
        print(change)


def main(arguments: list[str]) -> int:
    """Returns 1 if a figure is worse than its budget, else 0."""
    parser = argparse.ArgumentParser(prog="python3 -m codegen", description=ABOUT)
    parser.add_argument("--write", action="store_true", help="write budgets.csv anew, for this Triton")
    write = parser.parse_args(arguments).write
    if why_not := why_not_compiled():
        print(f"NOT RUN: {why_not}")
        return 0
    from codegen import launches  # needs Triton

    triton, budget = f"Triton {dispatch.TRITON_VERSION}", budgets.read()
    progress = tqdm(CASES, f"compiling with {triton}", unit="case")
    now = pd.concat([budgets.lines(case, launches.of_case(case)) for case in progress])
    changes = budgets.changes(now, budget)
    print(ABOUT)
    show(now, changes)
    if write:
        budgets.renewed(now, budget).to_csv(budgets.PATH, lineterminator="\n")
        print(f"DONE: {budgets.PATH.name} has {len(changes)} other figures of {triton}")
        return 0
    worse = int(changes["worse"].sum())
    print(f"{worse} figures are worse than their budgets, {len(changes) - worse} better.")
    print(f"{'FAIL' if worse else 'PASS'}; to renew them: {budgets.RENEW}")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
