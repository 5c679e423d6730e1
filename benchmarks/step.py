"""The job `step`: a training step of ResNet-50 (resnet.py), with torch.nn, torch.compile and bnfast: its
time, its memory, what the norms take of it, and whether variants train alike.

Time: a round gives each variant, eager and as a graph, a few steps one after another between two events,
behind one more step that is not timed, so that the clock never starts on an idle device; rounds go over
all of them again and again, each time from another one on, so that a drift of clocks meets all alike. A
sample begins with the weights before the first step. The figure is the median over rounds, per step.

What the norms take: the same network with nn.Identity for each norm is one more variant (norm "none"), so
the share is 1 - without / with, both from the same rounds. To add up kernels by name from a profiler fails
where it matters: Inductor puts norms into kernels with other things, names change with versions, and a
host that cannot keep up shows in no kernel. This way counts all that a network pays for having norms. So
of a fused variant, whose norms do the activation and the add as well, it can be small or even negative.

Memory: what a step adds at its peak to what was allocated before it, with parameters, buffers and
momentum. The batch itself and other variants' weights are not in it. Of a graph: during its capture.

cuDNN may try algorithms (torch.backends.cudnn.benchmark), as it may where people train at one size."""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor

from benchmarks import records, resnet, timing
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.resnet import COMPILED, PLAIN, TORCH, Run, Step, Task, Variant, allowed, apart, curve
from benchmarks.session import Session, as_text, begin, paragraph, progress, section
from benchmarks.timing import Spread, Stopwatch, on_host, one_thread
from codegen.cases import NAMES

T = TypeVar("T")
BATCHES = (256, 64, 32)
MODES = ("eager", "graph")
FEWEST_ROUNDS = 3  # for quartiles to mean something, even if the time is up
PART = "step"
TIMES = ["variant", "mode", "ms", "quartiles", "of torch", "norms", "peak MB", "apart", "allowed"]
LOSSES = ["variant", "mode", "apart", "allowed"]
ABOUT = (
    "Forward, loss, backward and a fused SGD with momentum; a graph has all of it in one CUDA graph. ms: the "
    "median of a step. of torch: its time in those of torch, in the same mode. norms: the share that is gone "
    "where nn.Identity stands for each norm."
)
ABOUT_LOSSES = (
    "apart: the largest relative difference of the losses from torch's eager ones over 20 steps; allowed: "
    "three times what torch's own differ by when the batch comes in another order."
)
ON_A_CPU = (
    "Without a GPU there is no step time of ResNet-50, no peak memory, no CUDA graph, and nothing that "
    "torch.compile, which takes minutes for it, could show. What can be shown is that a converted and a "
    "fused network train as torch's does: a tiny one here, in fp64, where rounding hides nothing."
)
Stages = Sequence[Sequence[Variant]]


@dataclass(frozen=True)
class Effort:
    """rounds: at most; steps: timed together in a round; losses: steps compared; orders: of the batch."""

    rounds: int = 12
    steps: int = 3
    losses: int = 20
    orders: int = 3


STAGES, EFFORT = (PLAIN, COMPILED), Effort()
TINY_BATCH, TINY_EFFORT = 8, Effort(rounds=3, steps=1)


# variants at one batch size, made ready and measured together


@dataclass
class Contestant:
    """A variant in one mode, and what is known of it: peak in bytes, losses of the first steps, samples in
    microseconds a step. failure: why it cannot be measured; then the rest says nothing."""

    variant: Variant
    mode: str
    ran: str = ""
    step: Step | None = None
    run: Run | None = None
    peak: int | None = None
    losses: Tensor | None = None
    samples: list[float] = field(default_factory=list)
    failure: str = ""


@contextlib.contextmanager
def excused(*contestants: Contestant) -> Iterator[None]:
    """Whatever is raised inside becomes the reason why these cannot be measured."""
    try:
        yield
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        for contestant in contestants:
            contestant.failure = f"{type(error).__name__}: {first}"[:200]
            contestant.step = contestant.run = None


def free(device: torch.device, compiled: bool = False) -> None:
    """Gives back what is referred to no more; all that torch.compile has made as well, if `compiled`."""
    if compiled:
        torch.compiler.reset()
    gc.collect()  # modules refer to one another in circles
    if timing.is_gpu(device):
        torch.cuda.empty_cache()


class Stage:
    """A failure of one contestant is its own. The first variant's eager losses are the reference of all."""

    def __init__(
        self, task: Task, batch: int, variants: Sequence[Variant], effort: Effort,
        time_is_up: Callable[[], bool], tick: Callable[[], object],
    ) -> None:  # fmt: skip
        self.task, self.batch = task, batch
        self.contestants = [Contestant(variant, mode) for variant in variants for mode in MODES]
        self.allowed: float | None = None
        self._effort, self._time_is_up, self._tick = effort, time_is_up, tick
        self._gpu = timing.is_gpu(task.device)

    def measure(self, stopwatch: Stopwatch) -> None:
        """Fills in the contestants; those without samples or a failure were not reached."""
        with excused(*self.contestants):
            self._x, self._labels = resnet.batch_of(self.task, self.batch)
            self._pool = torch.cuda.graph_pool_handle() if self._gpu else None
        first = self.contestants[0]
        for eager, graph in zip(self.contestants[::2], self.contestants[1::2], strict=True):
            if self._time_is_up():
                eager.failure = graph.failure = "no time left"
            if not eager.failure:
                self._prepare(eager, graph)
            if eager is first and first.step is not None and first.losses is not None:
                with excused(first):
                    given = (first.step, self._x, self._labels, first.losses)
                    self.allowed = allowed(*given, self._effort.orders)
            self._tick()
        self._time([each for each in self.contestants if not each.failure], stopwatch)

    def _prepare(self, eager: Contestant, graph: Contestant) -> None:
        with excused(eager, graph):
            step = Step(eager.variant, self.task, self._x, self._labels)
            eager.ran = graph.ran = eager.variant.ran(self.task, self.batch)
            step.warm_up()
            with excused(eager):
                eager.peak, _ = self._peak(step, step)
                self._enter(eager, step, step)
            with excused(graph):
                graph.peak, replay = self._peak(step, lambda: resnet.captured(step, self._pool))
                self._enter(graph, step, replay)
        if eager.failure:
            free(self.task.device)

    def _enter(self, contestant: Contestant, step: Step, run: Run) -> None:
        contestant.losses = curve(step, run, self._effort.losses)
        contestant.step, contestant.run = step, run

    def _peak(self, step: Step, work: Callable[[], T]) -> tuple[int | None, T]:
        """Bytes, and what `work` returns."""
        if not self._gpu:
            return None, work()
        step.drop_gradients()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before + step.nbytes(), result

    def _time(self, contestants: Sequence[Contestant], stopwatch: Stopwatch) -> None:
        for number in range(self._effort.rounds):
            if number >= FEWEST_ROUNDS and self._time_is_up():
                return
            for place in range(len(contestants)):
                contestant = contestants[(number + place) % len(contestants)]
                with excused(contestant):
                    self._sample(contestant, stopwatch)
            self._tick()

    def _sample(self, contestant: Contestant, stopwatch: Stopwatch) -> None:
        step, run = contestant.step, contestant.run
        if step is None or run is None:  # failed in an earlier round
            return

        def steps() -> None:
            for _ in range(self._effort.steps):
                run()

        step.reset()
        run()
        contestant.samples.append(stopwatch(steps) / self._effort.steps)

    def record(self, it: Contestant) -> Record:
        image, norms, reference = self.task.image, it.variant.norms, self.contestants[0].losses
        record = Record(
            "step", CANNOT, it.variant.name, network=str(self.task), norm="BatchNorm" if norms else "none",
            shape=f"{self.batch}x3x{image}x{image}", dtype=NAMES[self.task.dtype], layout="channels_last",
            activation="relu", direction="step", mode=it.mode,
            note=it.failure or "stopped" * (not it.samples),
        )  # fmt: skip
        if record.note:
            return record
        comparable = (
            norms and it.losses is not None and reference is not None and it is not self.contestants[0]
        )
        return replace(
            record, status=MEASURED, ran=it.ran, **Spread.of(it.samples).columns(),
            peak_MB=None if it.peak is None else it.peak / 1e6,
            loss_apart=apart(it.losses, reference) if comparable else None,  # type: ignore[arg-type]
            loss_allowed=self.allowed if norms else None,
        )  # fmt: skip


def measure_steps(
    task: Task, batches: Sequence[int] = BATCHES, budget: float | None = None, stages: Stages = STAGES,
    effort: Effort = EFFORT, stopwatch: Stopwatch | None = None,
    clock: Callable[[], float] = time.monotonic, tick: Callable[[], object] = lambda: None,
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
            stage = Stage(task, batch, variants, effort, time_is_up, tick)
            stopped = False
            try:
                with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                    stage.measure(stopwatch or watch(task.device))
            except KeyboardInterrupt:
                stopped = True
            yield from [stage.record(contestant) for contestant in stage.contestants]
            if stopped:
                raise KeyboardInterrupt
            del stage
            free(task.device, compiled=any(variant.compiled for variant in variants))


def ticks(batches: Sequence[int], stages: Stages, effort: Effort) -> int:
    """One for each variant that is made ready, and one a round."""
    return len(batches) * sum(len(variants) + effort.rounds for variants in stages)


def watch(device: torch.device) -> Stopwatch:
    """Unlike timing.on_gpu it neither waits for an idle device first nor gives the host a start."""

    def by_events(work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    return by_events if timing.is_gpu(device) else on_host


# the job


def plan(session: Session, batches: Sequence[int]) -> tuple[Task, Sequence[int], Stages, Effort]:
    """What is trained here, in which stages, and how often."""
    if session.gpu:
        return Task(session.device), batches, STAGES, EFFORT
    tiny = Task(session.device, torch.float64, width=8, classes=10, image=64)
    return tiny, (TINY_BATCH,), (tuple(variant for variant in PLAIN if variant.norms),), TINY_EFFORT


def rows(lines: Sequence[Record]) -> pd.DataFrame:
    """Of one batch size, in the order measured, with the columns TIMES. Each is held against the torch before
    it, as that was measured along with it, and against the network without norms of its own kind."""
    bare = {(line.variant, line.mode): line.us for line in lines if line.norm == "none"}
    torchs: dict[str, float] = {}
    found = []
    for line in lines:
        row = {"variant": line.variant + ", no norms" * (line.norm == "none"), "mode": line.mode}
        found.append(row)
        if line.status != MEASURED or line.us is None:
            row["ms"] = row["apart"] = "cannot"
            continue
        if line.variant == TORCH.name and line.norm != "none":
            torchs[line.mode] = line.us
        low, high = ((us or 0) / 1e3 for us in (line.us_low, line.us_high))
        row |= {"ms": f"{line.us / 1e3:.4g}", "quartiles": f"{low:.4g}-{high:.4g}"}
        if line.mode in torchs:
            row["of torch"] = f"{line.us / torchs[line.mode]:.3f}"
        without = bare.get(("torch.compile" if "torch.compile" in line.variant else TORCH.name, line.mode))
        if without is not None and line.norm != "none":
            row["norms"] = f"{1 - without / line.us:.1%}"
        forms = {
            "peak MB": (line.peak_MB, ".0f"),
            "apart": (line.loss_apart, ".1e"),
            "allowed": (line.loss_allowed, ".1e"),
        }
        row |= {name: format(value, form) for name, (value, form) in forms.items() if value is not None}
    return pd.DataFrame([{**dict.fromkeys(TIMES, ""), **row} for row in found])


def show(lines: Sequence[Record], headers: list[str]) -> None:
    """A table for each batch size, with these of TIMES, and why what is not in it is not."""
    for shape in dict.fromkeys(line.shape for line in lines):
        own = [line for line in lines if line.shape == shape]
        print(f"\n{own[0].network}, {shape}, {own[0].dtype}, {own[0].layout}")
        print(as_text(rows(own)[headers]), flush=True)
        reasons: dict[tuple[str, str], dict[str, None]] = {}
        for line in own:
            if line.note:
                reasons.setdefault((line.mode, line.note), {})[line.variant] = None
        for (mode, reason), names in reasons.items():
            paragraph(f"Cannot ({mode}): {', '.join(names)}: {reason}")


def disagreeing(lines: Sequence[Record]) -> list[str]:
    """Whose losses are not within what is allowed; a NaN is not."""
    return [
        f"{line.variant} ({line.mode}, {line.shape}): losses {line.loss_apart:.1e} apart, "
        f"{line.loss_allowed:.1e} allowed"
        for line in lines
        if line.loss_apart is not None and line.loss_allowed is not None
        and not line.loss_apart <= line.loss_allowed
    ]  # fmt: skip


def judge(session: Session, lines: Sequence[Record]) -> None:
    measured = f"{sum(line.status == MEASURED for line in lines)} of {len(lines)} measured"
    if not any(line.loss_apart is not None for line in lines if line.variant != TORCH.name):
        session.note(PART, "NOT RUN", f"{measured}, and no losses of bnfast's to compare")
        return
    faults = disagreeing(lines)
    size = "" if session.gpu else " (a tiny network; step times need a GPU)"
    text = "; ".join(faults) or f"{measured}, all losses agree{size}"
    session.note(PART, "FAIL" if faults else "PASS", text)


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Each record is on the disk as soon as it is there; Ctrl-C shows what was measured until then."""
    session = begin(options, lacking, "bnfast: a training step of ResNet-50")
    task, batches, stages, effort = plan(session, options.batch)
    section("A training step", ABOUT if session.gpu else ON_A_CPU)
    paragraph(ABOUT_LOSSES)
    lines: list[Record] = []
    total = ticks(batches, stages, effort)
    with (
        progress(total=total, desc="training steps") as bar,
        contextlib.nullcontext() if session.gpu else one_thread(),
    ):
        found = measure_steps(task, batches, options.budget, stages, effort, tick=partial(bar.update, 1))
        try:
            for line in found:
                records.append(session.folder / "step.csv", [line])
                lines.append(line)
        except KeyboardInterrupt:
            paragraph("Stopped: what follows is what was measured until then.")
    show(lines, TIMES if session.gpu else LOSSES)
    judge(session, lines)
    return session.close()
