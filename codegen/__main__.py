"""`python3 -m codegen`: what the kernels take now, beside budgets.csv; with --write, that file is renewed.

It needs what `python3 -m tests` installs, and no GPU."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

from bnfast import dispatch
from codegen import budgets, why_not_compiled
from codegen.budget_cases import ENTRIES, Entry
from codegen.budgets import Change, Code, Key, Line, Lines

ABOUT = """\
Launches and bytes (MB) of a layer's kernels, registers a thread, KB that an SM waits for at a time, and bytes
of the average load, counted from plan and machine code for an H200. Where a figure is not its budget:
budget -> now."""
COLUMNS = ("kernel", "runs", "MB", "registers", "KB", "a load")
WIDTHS = (34, 8, 18, 12, 16, 14)


def counted(entry: Entry) -> Lines:
    """What an entry's kernels take now. Without `code` where this process cannot compile."""
    from codegen import figures  # needs Triton

    lines: Lines = {}
    for direction, several in figures.of_case(entry.case, entry.training).items():
        for each in several:
            code = {}
            if each.registers is not None and each.in_flight is not None and each.load is not None:
                code[str(dispatch.TRITON_VERSION)] = Code(
                    each.registers, round(each.in_flight / 1024, 1), round(each.load, 1)
                )
            key = Key(str(entry), direction, each.kernel)
            if key in lines:
                raise ValueError(f"{key} is launched twice, and budgets have one line for it")
            lines[key] = Line(1, each.bytes, code=code)
    return lines


def row(key: Key, now: Line, found: Sequence[Change]) -> list[str]:
    """A kernel's line for the terminal."""
    before = {change.figure.partition(" (")[0]: change.was for change in found if change.key == key}

    def cell(figure: str, value: float, show: str, scale: float = 1) -> str:
        if figure not in before:
            return format(value / scale, show)
        was = before[figure]
        return f"{'none' if was is None else format(was / scale, show)} -> {format(value / scale, show)}"

    (code,) = now.code.values()
    return [
        f"  {key.direction} {key.kernel.removesuffix('_kernel')}", cell("launches", now.launches, ".0f"),
        cell("bytes", now.bytes or 0, ".1f", 1e6), cell(budgets.REGISTERS, code.registers, ".0f"),
        cell(budgets.IN_FLIGHT, code.in_flight_KB, ".1f"), cell(budgets.LOAD, code.load, ".1f"),
    ]  # fmt: skip


def show(now: Lines, found: Sequence[Change]) -> None:
    def line(cells: Sequence[str]) -> None:
        print("".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip())

    line(COLUMNS)
    for case, keys in itertools.groupby(now, lambda key: key.case):
        print(case)
        for key in keys:
            line(row(key, now[key], found))
    for change in found:
        if change.key not in now:
            print(change)


def main(arguments: list[str]) -> int:
    """Returns 1 if a figure is worse than its budget, else 0."""
    parser = argparse.ArgumentParser(prog="python3 -m codegen", description=ABOUT)
    parser.add_argument("--write", action="store_true", help="write budgets.csv anew, for this Triton")
    write = parser.parse_args(arguments).write
    why_not = why_not_compiled()
    if why_not:
        print(f"NOT RUN: {why_not}")
        return 0
    now: Lines = {}
    for number, entry in enumerate(ENTRIES, 1):
        print(f"  [{number}/{len(ENTRIES)}] {entry}", file=sys.stderr, flush=True)
        now |= counted(entry)
    budget = budgets.read()
    found = budgets.changes(now, budget)
    print(ABOUT)
    show(now, found)
    if write:
        budgets.write(budgets.PATH, budgets.renewed(now, budget))
        print(f"DONE: {budgets.PATH.name} has {len(found)} other figures of Triton {dispatch.TRITON_VERSION}")
        return 0
    worse = sum(change.worse for change in found)
    print(f"{worse} figures are worse than their budgets, {len(found) - worse} better.")
    print(f"{'FAIL' if worse else 'PASS'}; to renew them: {budgets.RENEW}")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
