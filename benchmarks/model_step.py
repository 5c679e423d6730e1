"""One training step of ResNet-50 (benchmarks.model_variants), measured: its time, its memory, what the norms
take of it, and whether variants train alike (benchmarks.model_losses).

Time: a round gives each variant, eager and as a graph, a few steps one after another between two events,
behind one more step that is not timed, so that the clock never starts on an idle device; rounds go over all
of them again and again, each time from another one on, so that a drift of clocks meets all alike. A sample
begins with the weights before the first step. The figure is the median over rounds, per step.

What the norms take: the same network with nn.Identity for each norm is one more variant (norm "none"), so the
share is 1 - without / with, both from the same rounds. The other way, to add up kernels by name from a
profiler, fails where it matters: Inductor puts norms into kernels with other things, names change with
versions, and a host that cannot keep up shows in no kernel. This way counts all that a network pays for
having norms. So of a fused variant, whose norms do the activation and the add as well, it can be small or
even negative, as the network without norms pays for those.

Memory: what a step adds at its peak to what was allocated before it, with parameters, buffers and momentum.
The batch itself and other variants' weights are not in it. Of a graph: during its capture.

cuDNN may try algorithms (torch.backends.cudnn.benchmark), as it may where people train at one size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import model_stage
from benchmarks.model_stage import Contestant, Effort, Stage
from benchmarks.model_variants import COMPILED, PLAIN, Task, Variant
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.stopwatch import Spread, Stopwatch, on_host
from codegen.cases import NAMES

BATCHES = (256, 64, 32)


def measure_steps(
    task: Task, batches: Sequence[int] = BATCHES, budget: float | None = None,
    stages: Sequence[Sequence[Variant]] = (PLAIN, COMPILED), effort: Effort | None = None,
    stopwatch: Stopwatch | None = None, clock: Callable[[], float] = time.monotonic,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[Record]:  # fmt: skip
    """A record for each variant, mode and batch size, as soon as it is there: stage by stage, in each the
    batch sizes in the order given, all variants of a stage and a batch size at once. The first variant of a
    stage is the reference, and so is measured in each.

    budget: seconds, after which nothing new is begun: what was not begun is CANNOT, and what was is ended,
    with few rounds. stopwatch: how long what it is given takes, in microseconds; by default the device's own.
    tick: called `ticks` times, for a progress bar; less often if the time is up. KeyboardInterrupt comes
    after the records of what was measured until then.
    ValueError: no batch size, one that is no positive number, or a budget that is none."""
    if not batches or any(batch < 1 for batch in batches):
        raise ValueError(f"batches must be one or more positive numbers, and these are {list(batches)}")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, or None, and it is {budget}")
    start = clock()

    def time_is_up() -> bool:
        return budget is not None and clock() - start >= budget

    for variants in stages:
        for batch in batches:
            stage = Stage(task, batch, variants, effort or Effort(), time_is_up, tick)
            stopped = False
            try:
                with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                    stage.measure(stopwatch or watch(task.device))
            except KeyboardInterrupt:
                stopped = True
            yield from [_record(stage, contestant) for contestant in stage.contestants]
            if stopped:
                raise KeyboardInterrupt
            del stage
            model_stage.free(task.device, compiled=any(variant.compiled for variant in variants))


def ticks(batches: Sequence[int], stages: Sequence[Sequence[Variant]], effort: Effort) -> int:
    """One for each variant that is made ready, and one a round."""
    return len(batches) * sum(len(variants) + effort.rounds for variants in stages)


def watch(device: torch.device) -> Stopwatch:
    """Unlike stopwatch.on_gpu it neither waits for an idle device first nor gives the host a start."""

    def by_events(work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    return by_events if device.type == "cuda" else on_host


def _record(stage: Stage, it: Contestant) -> Record:
    task = stage.task
    record = Record(
        "step", CANNOT, it.variant.name, network=str(task), norm="BatchNorm" if it.variant.norms else "none",
        shape=f"{stage.batch}x3x{task.image}x{task.image}", dtype=NAMES[task.dtype],
        layout="channels_last", activation="relu", direction="step", mode=it.mode,
        note=it.failure or "stopped" * (not it.samples),
    )  # fmt: skip
    if record.note:
        return record
    return replace(
        record, status=MEASURED, ran=it.ran, **Spread.of(it.samples).columns(),
        peak_MB=None if it.peak is None else it.peak / 1e6, loss_apart=stage.apart(it),
        loss_allowed=stage.allowed if it.variant.norms else None,
    )  # fmt: skip
