"""The job `host`: what an eager call costs the host, beside torch.nn.functional's, on any machine.

Everything runs as with a GPU but the driver, which is made up: kernels are compiled and bound, and launching
one does nothing. So this is bnfast's own Python and Triton's launcher. torch's side computes a tiny tensor on
the CPU: its host time without a GPU's driver too, and a little arithmetic."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import bnfast
from benchmarks import records, stamp
from benchmarks.records import MEASURED, Record
from benchmarks.session import as_text, begin, section
from benchmarks.timing import Spread, one_thread
from codegen import why_not_compiled

ROUNDS, CALLS = 40, 50
Call = Callable[[], Tensor]


def calls() -> dict[tuple[str, str], tuple[Call, Call]]:
    """(function, with or without gradient): ours and torch's."""
    x, rows = torch.randn(2, 4, 2, 2), torch.randn(4, 64)
    found: dict[tuple[str, str], tuple[Call, Call]] = {}
    for gradient in (False, True):
        affine = [torch.full((4,), value, requires_grad=gradient) for value in (1.0, 0.0)]
        wide = [torch.full((64,), value, requires_grad=gradient) for value in (1.0, 0.0)]
        given = {
            "batch_norm": (x, torch.zeros(4), torch.ones(4), *affine, True),
            "group_norm": (x, 2, *affine),
            "instance_norm": (x, None, None, *affine),
            "layer_norm": (rows, (64,), *wide),
        }
        for name, arguments in given.items():
            ours, theirs = (partial(getattr(library, name), *arguments) for library in (bnfast.functional, F))
            found[name, "with gradient" if gradient else "without gradient"] = ours, theirs
    return found


def measure() -> Iterator[Record]:
    """Two records for each of `calls`: bnfast's and torch's. Their readings take turns."""
    from codegen.fake_driver import host_microseconds  # needs Triton
    from codegen.launches import as_on_a_gpu

    with one_thread(), as_on_a_gpu():
        for (name, mode), pair in calls().items():
            for call in pair:
                call()
            readings = [[host_microseconds(call, CALLS) for call in pair] for _ in range(ROUNDS)]
            for variant, samples in zip(("bnfast", "torch"), zip(*readings, strict=True), strict=True):
                spread = {key: round(value, 2) for key, value in Spread.of(samples).columns().items()}
                yield Record(
                    "host", MEASURED, variant, name, direction="forward", mode="eager",
                    host_us=spread.pop("us"), note=mode, **spread,
                )  # fmt: skip


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    session = begin(options, lacking, "bnfast: what an eager call costs the host")
    section("Host time of a forward", (__doc__ or "").partition("\n\n")[2])
    why_not = why_not_compiled()
    if why_not:
        session.note("host", "NOT RUN", why_not)
        return session.close()
    found = [dataclasses.replace(r, **stamp.columns(session.device)) for r in measure()]
    records.append(session.folder / "host.csv", found)
    lines = records.frame(found).pivot_table("host_us", ["ran", "note"], "variant", sort=False)
    lines.index = lines.index.map(", ".join).rename("function")
    table = lines.add_suffix(" us").assign(ratio=(lines["bnfast"] / lines["torch"]).round(2))
    print(as_text(table.reset_index()))
    session.note("host", "DONE", f"{len(table)} calls measured, medians of {ROUNDS} readings")
    return session.close()
