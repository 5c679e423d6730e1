"""The job `budgets`: what kernels take now, beside what is committed; with --write, committed anew."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from benchmarks import budgets, predict, report
from benchmarks.budget_cases import ENTRIES, Entry
from benchmarks.budgets import Change, Code, Key, Line, Lines
from benchmarks.session import Session, begin
from bnfast import dispatch

ABOUT = (
    "Launches and bytes (MB) of a layer's kernels, registers a thread, KB that an SM waits for at a time, "
    "and bytes of the average load, counted from plan and machine code for an H200. Where a figure is not "
    "its budget: budget -> now."
)


def counted(entry: Entry) -> Lines:
    """What an entry's kernels take now. Without `code` where this process cannot compile."""
    from benchmarks.static import figures

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
    kernel = key.kernel.removesuffix("_kernel")
    return [
        f"  {key.direction} {kernel}", cell("launches", now.launches, ".0f"),
        cell("bytes", now.bytes or 0, ".1f", 1e6), cell(budgets.REGISTERS, code.registers, ".0f"),
        cell(budgets.IN_FLIGHT, code.in_flight_KB, ".1f"), cell(budgets.LOAD, code.load, ".1f"),
    ]  # fmt: skip


def show(now: Lines, found: Sequence[Change]) -> None:
    rows: list[list[str]] = []
    for case, keys in itertools.groupby(now, lambda key: key.case):
        rows.append([case, "", "", "", "", ""])
        rows += [row(key, now[key], found) for key in keys]
    print(report.table(("kernel", "runs", "MB", "registers", "KB", "a load"), rows), flush=True)
    for change in found:
        if change.key not in now:
            report.paragraph(str(change))


def verdict(session: Session, found: Sequence[Change]) -> None:
    worse, better = (sum(change.worse is side for change in found) for side in (True, False))
    text = f"{worse} figures worse than their budgets, {better} better; to renew them: {budgets.RENEW}"
    if not found:
        text = "every figure is what its budget says"
    session.note("budgets", "FAIL" if worse else "PASS", text)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    session = begin(options, lacking, "bnfast: what kernels take, and what they may")
    report.section("Budgets", ABOUT)
    why_not = predict.why_not_compiled()
    if why_not:
        session.note("budgets", "NOT RUN", why_not)
        return session.close()
    now: Lines = {}
    with report.progress(len(ENTRIES), f"compiling with Triton {dispatch.TRITON_VERSION}") as bar:
        for entry in ENTRIES:
            now |= counted(entry)
            bar.update(1)
    budget = budgets.read()
    found = budgets.changes(now, budget)
    show(now, found)
    budgets.write(session.folder / budgets.PATH.name, now)
    if options.write:
        budgets.write(budgets.PATH, budgets.renewed(now, budget))
        columns = f"its columns of Triton {dispatch.TRITON_VERSION} are new"
        session.note(
            "budgets", "DONE", f"{budgets.PATH.name} is written, {len(found)} figures changed; {columns}"
        )
    else:
        verdict(session, found)
    return session.close()
