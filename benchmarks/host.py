"""The job `host`: what an eager call costs the host, beside torch.nn.functional's, on any machine.

Everything runs as with a GPU but the driver, which is made up: kernels are compiled and bound, and launching
one does nothing. So this is bnfast's own Python and Triton's launcher. torch's side computes a tiny tensor on
the CPU: its host time without a GPU's driver too, and a little arithmetic."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import bnfast
from benchmarks import stamp
from benchmarks.session import as_text, begin, section
from benchmarks.timing import host_microseconds, one_thread
from codegen import why_not_compiled

ROUNDS, CALLS = 40, 50
Call = Callable[[], Tensor]


def calls() -> Iterator[tuple[str, Call, Call]]:
    """Function, with or without gradient; ours; torch's."""
    for mode in ("without gradient", "with gradient"):
        few, many = (
            [torch.full((size,), value, requires_grad=mode == "with gradient") for value in (1.0, 0.0)]
            for size in (4, 64)
        )
        x = torch.randn(2, 4, 2, 2)
        given = {
            "batch_norm": (x, torch.zeros(4), torch.ones(4), *few, True),
            "group_norm": (x, 2, *few),
            "instance_norm": (x, None, None, *few),
            "layer_norm": (torch.randn(4, 64), (64,), *many),
        }
        for name, arguments in given.items():
            ours, theirs = (partial(getattr(library, name), *arguments) for library in (bnfast.functional, F))
            yield f"{name}, {mode}", ours, theirs


def measure() -> pd.DataFrame:
    """A row for each of `calls`: microseconds of both, whose readings take turns."""
    from bnfast.ptx.driver import as_on_a_gpu  # needs Triton

    rows = []
    with one_thread(), as_on_a_gpu():
        for name, *pair in calls():
            readings = [[host_microseconds(call, CALLS) for call in pair] for _ in range(ROUNDS)]
            ours, theirs = map(median, zip(*readings, strict=True))
            rows.append((name, ours, theirs, ours / theirs))
    return pd.DataFrame(rows, columns=["function", "bnfast us", "torch us", "ratio"]).round(2)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    session = begin(options, lacking, "bnfast: what an eager call costs the host")
    section("Host time of a forward", (__doc__ or "").partition("\n\n")[2])
    why_not = why_not_compiled()
    if why_not:
        session.note("host", "NOT RUN", why_not)
        return session.close()
    found = measure()
    found.assign(**stamp.columns(session.device)).to_csv(session.folder / "host.csv", index=False)
    print(as_text(found))
    session.note("host", "DONE", f"{len(found)} calls measured, medians of {ROUNDS} readings")
    return session.close()
