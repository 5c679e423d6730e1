"""Which kernels contenders run on a GPU, and how many, by torch's profiler.

It is a pass of its own after all that is timed: what the profiler hooks into the driver stays there until the
process ends, and could slow launches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.baselines import Baseline
from benchmarks.cases import columns
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.tables import SEPARATOR
from benchmarks.timing import Timed, Work, one_line
from codegen.cases import DIRECTIONS, Case

UNCHECKED = measure.Method(verify=False)  # who is wrong or cannot run was told by the pass that timed them
UNSEEN = "torch's profiler saw nothing on the GPU"


def on_gpu(events: Iterable[Any]) -> list[str]:
    """The names of what ran on the GPU, copies and fills too, in that order; not the marks that a program
    leaves for the reader of a trace, which torch lists as the GPU's too."""
    found = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return [e.name for e in sorted(found, key=lambda event: event.time_range.start)]


def profiled(work: Work) -> list[str]:
    """All that `work` puts on the GPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch 2.13 writes two lines to stderr each time
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as watched:
        work()
        torch.cuda.synchronize()
    return on_gpu(watched.events())


def kernels(timed: Timed) -> list[str]:
    """Of its second run: what it compiles or allocates at first is left out."""
    timed.prepare()
    timed.work()
    timed.clean()
    timed.prepare()
    names = profiled(timed.work)
    timed.clean()
    return names


def of_case(case: Case, baselines: Sequence[Baseline], device: torch.device) -> Iterator[Record]:
    """A record for each direction of each contender that can run the case: `launches`, and in `ran` their
    names."""
    tensors = measure.Tensors.of(case, device, 1)
    for found in measure.ready(case, baselines, device, UNCHECKED):
        if isinstance(found, Record):
            continue
        shared = {**columns(case), "kind": "kernels", "variant": found.name}
        for direction in DIRECTIONS:
            way = {**shared, "direction": direction}
            try:
                names = kernels(measure.Calls(found.contender, tensors).timed(direction, [0]))
            except Exception as e:
                yield Record(**way, status=CANNOT, note=one_line(e))
                continue
            if names:
                yield Record(**way, status=MEASURED, launches=len(names), ran=SEPARATOR.join(names))
            else:
                yield Record(**way, status=CANNOT, note=UNSEEN)
