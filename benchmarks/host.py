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
    found: dict[tuple[str, str], tuple[Call, Call]] = {}
    for gradient in (False, True):
        mode = "with gradient" if gradient else "without gradient"

        def vector(value: float, size: int, gradient: bool = gradient) -> Tensor:
            return torch.full((size,), float(value), requires_grad=gradient)

        x, rows = torch.randn(2, 4, 2, 2), torch.randn(4, 64)
        given: dict[str, tuple[object, ...]] = {
            "batch_norm": (x, torch.zeros(4), torch.ones(4), vector(1, 4), vector(0, 4), True),
            "group_norm": (x, 2, vector(1, 4), vector(0, 4)),
            "instance_norm": (x, None, None, vector(1, 4), vector(0, 4)),
            "layer_norm": (rows, (64,), vector(1, 64), vector(0, 64)),
        }
        for name, arguments in given.items():
            ours, theirs = (partial(getattr(lib, name), *arguments) for lib in (bnfast.functional, F))
            found[name, mode] = ours, theirs
    return found


def measure() -> Iterator[Record]:
    """Two records for each of `calls`: bnfast's and torch's. Their readings take turns."""
    from codegen.fake_driver import host_microseconds  # needs Triton
    from codegen.launches import as_on_a_gpu

    with one_thread(), as_on_a_gpu():
        for (name, mode), pair in calls().items():
            for call in pair:
                call()
            readings = [[host_microseconds(call, CALLS, 1) for call in pair] for _ in range(ROUNDS)]
            for variant, samples in zip(("bnfast", "torch"), zip(*readings, strict=True), strict=True):
                spread = Spread.of(samples)
                yield Record(
                    "host", MEASURED, variant, name, direction="forward", mode="eager", rounds=ROUNDS,
                    host_us=round(spread.us, 2), us_low=round(spread.us_low, 2),
                    us_high=round(spread.us_high, 2), note=mode,
                )  # fmt: skip


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    session = begin(options, lacking, "bnfast: what an eager call costs the host")
    section("Host time of a forward", " ".join((__doc__ or "").split("\n\n")[1].split()))
    why_not = why_not_compiled()
    if why_not:
        session.note("host", "NOT RUN", why_not)
        return session.close()
    found = [dataclasses.replace(r, **stamp.columns(session.device)) for r in measure()]
    records.append(session.folder / "host.csv", found)
    lines = records.frame(found).pivot_table("host_us", ["ran", "note"], "variant", sort=False)
    lines.index = [", ".join(each) for each in lines.index]
    table = lines.add_suffix(" us").assign(ratio=(lines["bnfast"] / lines["torch"]).round(2))
    print(as_text(table.rename_axis("function").reset_index()))
    session.note("host", "DONE", f"{len(table)} calls measured, medians of {ROUNDS} readings")
    return session.close()
