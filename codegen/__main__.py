"""`python3 -m codegen`: what the kernels take now, beside budgets.csv; with --write, that file is renewed.

It needs what `python3 -m tests` installs, and no GPU."""

from __future__ import annotations

import argparse
import sys

import pandas as pd
from tqdm import tqdm

from bnfast import dispatch
from codegen import budgets, why_not_counted
from codegen.cases import CASES

ABOUT = """\
Of a layer's kernels, as compiled for an H200: MB that they have to move, registers a thread, KB
that an SM waits for at a time, bytes of the average load. Executed: about how many machine
instructions a thread issues for 16 bytes; 32-byte sectors, wavefronts of shared memory and barriers
of a program; and how often the program that finalizes waits for memory. A figure that is not its
budget is followed by a star."""
NAME_WIDTH, WIDTH = 32, 6
COLUMNS = {  # figure: (title, unit, format)
    "bytes": ("MB", 1e6, ".1f"),
    budgets.REGISTERS: ("regs", 1, ".0f"),
    budgets.IN_FLIGHT: ("KB", 1, ".1f"),
    budgets.LOAD: ("load", 1, ".1f"),
    budgets.INSTRUCTIONS: ("instr", 1, ".1f"),
    budgets.SECTORS: ("sector", 1, ".0f"),
    budgets.WAVEFRONTS: ("wavefr", 1, ".0f"),
    budgets.BARRIERS: ("bars", 1, ".0f"),
    budgets.ROUND_TRIPS: ("trips", 1, ".0f"),
}


def show(now: pd.DataFrame, changes: pd.DataFrame) -> None:
    """now: with figures of one Triton."""
    changed = set(changes.index)
    titles = " ".join(f"{title:>{WIDTH}}" for title, _, _ in COLUMNS.values())
    print(f"{'kernel':{NAME_WIDTH}}{titles}")
    for case, lines in now.groupby(level="case", sort=False):
        print(case)
        for key, line in lines.drop(columns="launches").iterrows():
            shown = f"  {key[1]} {key[2].removesuffix('_kernel')}".ljust(NAME_WIDTH)
            for (figure, value), (_, unit, form) in zip(line.items(), COLUMNS.values(), strict=True):
                shown += f"{value / unit:{WIDTH}{form}}" + ("*" if (*key, figure) in changed else " ")
            print(shown.rstrip())
    print(*budgets.told(changes), sep="\n")


def main(arguments: list[str]) -> int:
    """Returns 1 if a figure is worse than its budget, else 0."""
    parser = argparse.ArgumentParser(prog="python3 -m codegen", description=ABOUT)
    parser.add_argument("--write", action="store_true", help="write budgets.csv anew, for this Triton")
    write = parser.parse_args(arguments).write
    if why_not := why_not_counted():
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
