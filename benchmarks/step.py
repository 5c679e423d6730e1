"""The job `step`: a training step of ResNet-50 (resnet.py), with torch.nn, torch.compile and bnfast: its
time, its memory, and whether variants train alike.

Time: a sample begins with the weights before the first step and one step that is not timed, so that the clock
never starts on an idle device; then a few steps run between two events. The variants of a stage, eager and as
a graph, are sampled in turns. The figure is the median over rounds, per step.

cuDNN may try algorithms (torch.backends.cudnn.benchmark), as it may where people train at one size."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import records, report, stamp, timing
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.resnet import COMPILED, PLAIN, TORCH, Task, Variant, network, wide
from benchmarks.session import begin, paragraph, progress, section
from benchmarks.timing import Spread, one_line
from codegen.cases import NAMES

Run = Callable[[], Tensor]  # one training step, its loss
Stages = Sequence[Sequence[Variant]]
BATCHES = (256, 64, 32)
MODES = ("eager", "graph")
FEWEST_ROUNDS = 3  # for quartiles to mean something, even if the time is up
WARM_UP = 3  # steps: the first compiles and tries algorithms, the second has momentum to add to
LEARNING_RATE, MOMENTUM = 0.01, 0.9
FACTOR = 3.0
ABOUT = (
    "Forward, loss, backward and a fused SGD with momentum; a graph has all of it in one CUDA graph. ms: the "
    "median of a step. of torch: its time in those of torch, in the same mode. peak MB: what a step adds to "
    "weights, momentum and batch. apart: the largest relative difference of the losses from torch's eager "
    "ones over 20 steps; allowed: three times what torch's own differ by when the batch is in another order."
)


@dataclass(frozen=True)
class Effort:
    """rounds: at most; steps: timed together in a round; losses: steps compared; orders: of the batch."""

    rounds: int = 12
    steps: int = 3
    losses: int = 20
    orders: int = 3


STAGES, EFFORT = (PLAIN, COMPILED), Effort()


class Step:
    """One training step: SGD with momentum, fused, on a batch that stays where it is, as a CUDA graph wants.

    Called: trains one step, and returns the loss before it, a scalar on the device."""

    def __init__(self, variant: Variant, task: Task, x: Tensor, labels: Tensor) -> None:
        model = variant.change(network(task))
        self._start = {name: t.clone() for name, t in model.state_dict().items()}  # on the CPU
        model.to(x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model.train()
        # dynamic=False, or the second batch size would be compiled for all sizes
        self._network = torch.compile(self.model, dynamic=False) if variant.compiled else self.model
        self._optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, fused=True)
        self._x, self._labels = x, labels

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        y = self._network(self._x)
        loss = F.cross_entropy(y.to(wide(y.dtype)), self._labels)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def reset(self) -> None:
        """Everything as before the first step, in the same memory."""
        self.model.load_state_dict(self._start)
        for state in self._optimizer.state.values():
            state["momentum_buffer"].zero_()

    def peak(self, work: Callable[[], Run]) -> tuple[int, Run]:
        """The bytes that are allocated at the peak of `work`, and what it returns."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result

    def eager(self, pool: Any) -> Run:
        self()
        return self

    def graph(self, pool: Any) -> Run:
        """The whole step, warmed up before, as a CUDA graph; call what is returned to replay it.

        pool: memory that graphs share, since several steps' activations would not fit beside one another.
        That is sound as long as they never run at once, and the loss of one is read before another runs."""
        graph, loss = timing.captured(self, pool)

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay


# losses


def curve(step: Step, run: Run, steps: int) -> Tensor:
    """The losses of the first steps, [steps], in their dtype, on the CPU. run: the step, or a graph of it."""
    step.reset()
    return torch.stack([run().clone() for _ in range(steps)]).cpu()


def apart(losses: Tensor, reference: Tensor) -> float:
    """The largest relative difference; NaN if there is any."""
    theirs = reference.double()
    return float(((losses.double() - theirs) / theirs).abs().max())


def allowed(task: Task, x: Tensor, labels: Tensor, reference: Tensor, orders: int) -> float:
    """What `apart` may be for losses on this batch, of which torch.nn's are `reference`.

    Correct variants differ by rounding, and training magnifies it, by how much nobody can tell beforehand. So
    torch.nn is held against itself: its batch in another order is the same problem but for rounding. What a
    few orders differ by at most, times a factor since they are few, is what a variant may differ by. Seen on
    a CPU with ResNet-50 of width 8 in bf16: an order was never beyond three times the largest of three
    others; norm, add and ReLU rounded once were 0.6 to 1.6 times that, and a gradient of BatchNorm's weights
    that is 20 % too large 6 to 20 times. Smaller faults are for the tests of the layers."""
    generator = torch.Generator().manual_seed(0)
    seen = [torch.finfo(reference.dtype).eps]
    for _ in range(orders):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        other = x[order].contiguous(memory_format=torch.channels_last)
        step = Step(TORCH, task, other, labels[order])
        seen.append(apart(curve(step, step, len(reference)), reference))
    return FACTOR * float(torch.tensor(seen, dtype=torch.float64).max())  # NaN if any is


# a stage: variants at one batch size, made ready and timed together


@dataclass
class Contestant:
    """A variant in one mode: losses of its first steps, and samples in microseconds a step. failure: why it
    cannot be measured; then the rest says nothing."""

    variant: Variant
    mode: str
    failure: str = ""
    step: Step | None = None
    run: Run | None = None
    peak: int = 0
    losses: Tensor | None = None
    samples: list[float] = field(default_factory=list)

    def sample(self, steps: int) -> None:
        if self.step is not None and self.run is not None:
            self.step.reset()
            self.run()
            self.samples.append(stopwatch(timing.repeated(self.run, steps)) / steps)


@contextlib.contextmanager
def excused(*contestants: Contestant) -> Iterator[None]:
    """Whatever is raised inside becomes the reason why these cannot be measured."""
    try:
        yield
    except Exception as error:
        for contestant in contestants:
            contestant.failure, contestant.step, contestant.run = one_line(error), None, None


def make_ready(
    contestants: Sequence[Contestant], task: Task, batch: tuple[Tensor, Tensor], losses: int, pool: Any
) -> None:
    """Of one variant, in all modes."""
    with excused(*contestants):
        step = Step(contestants[0].variant, task, *batch)
        timing.on_a_side_stream(timing.repeated(step, WARM_UP))  # as a capture wants it
        free()  # what is cached for that stream is of no use to others
        for contestant in contestants:
            with excused(contestant):
                contestant.peak, run = step.peak(partial(getattr(step, contestant.mode), pool))
                contestant.losses = curve(step, run, losses)
                contestant.step, contestant.run = step, run


def measure_stage(
    task: Task, size: int, variants: Sequence[Variant], effort: Effort, end: float
) -> list[Record]:
    """A failure of one contestant is its own. The first variant's eager losses are the reference of all."""
    batch, pool, limit = task.batch(size), torch.cuda.graph_pool_handle(), None
    contestants: list[Contestant] = []
    for variant in progress(variants, desc=f"batch {size}, making ready"):
        late = "no time left" * (monotonic() >= end)
        own = [Contestant(variant, mode, late) for mode in MODES]
        contestants += own
        if not late:
            make_ready(own, task, batch, effort.losses, pool)
            free()
    first = contestants[0]
    if first.losses is not None:
        with excused(first):
            limit = allowed(task, *batch, first.losses, effort.orders)
    for number in progress(range(effort.rounds), desc=f"batch {size}, rounds"):
        if number >= FEWEST_ROUNDS and monotonic() >= end:
            break
        for contestant in reversed(contestants) if number % 2 else contestants:
            with excused(contestant):
                contestant.sample(effort.steps)
    return [record(each, task, batch[0], first, limit) for each in contestants]


def free() -> None:
    """Gives back what is referred to no more."""
    gc.collect()  # modules refer to one another in circles
    torch.cuda.empty_cache()


def record(it: Contestant, task: Task, x: Tensor, first: Contestant, limit: float | None) -> Record:
    shared = Record(
        "step", CANNOT, it.variant.name, network=str(task), norm="BatchNorm",
        shape="x".join(map(str, x.shape)), dtype=NAMES[task.dtype], layout="channels_last",
        activation="relu", direction="step", mode=it.mode, note=it.failure,
    )  # fmt: skip
    if it.failure:
        return shared
    comparable = it is not first and limit is not None
    return dataclasses.replace(
        shared, status=MEASURED, ran=it.variant.ran(x), **Spread.of(it.samples).columns(),
        peak_MB=it.peak / 1e6,
        loss_apart=apart(it.losses, first.losses) if comparable else None,  # type: ignore[arg-type]
        loss_allowed=limit if comparable else None,
    )  # fmt: skip


def measure_steps(
    task: Task, batches: Sequence[int] = BATCHES, budget: float | None = None, stages: Stages = STAGES,
    effort: Effort = EFFORT,
) -> Iterator[Record]:  # fmt: skip
    """A record for each variant, mode and batch size, as soon as a stage is measured at a batch size. Each
    stage has its number in `suite`. budget: seconds, after which nothing new is begun: what was not begun is
    CANNOT, and what was is ended, with few rounds."""
    end = math.inf if budget is None else monotonic() + budget
    for (number, variants), size in itertools.product(enumerate(stages, 1), batches):
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            found = measure_stage(task, size, variants, effort, end)
        torch.compiler.reset()
        free()
        yield from (dataclasses.replace(each, suite=f"stage {number}") for each in found)


def stopwatch(work: Callable[[], object]) -> float:
    """Unlike timing.on_gpu it neither waits for an idle device first nor gives the host a start."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


# the job


def disagreeing(lines: Sequence[Record]) -> list[str]:
    """Whose losses are not within what is allowed; a NaN is not."""
    return [
        f"{line.variant} ({line.mode}, {line.shape}): losses {line.loss_apart:.1e} apart, "
        f"{line.loss_allowed:.1e} allowed"
        for line in lines
        if line.loss_apart is not None and line.loss_allowed is not None
        and not line.loss_apart <= line.loss_allowed
    ]  # fmt: skip


def run(options: argparse.Namespace, lacking: list[str]) -> int:
    """Each stage is on the disk as soon as it is measured; Ctrl-C shows what was measured until then."""
    session = begin(options, lacking, "bnfast: a training step of ResNet-50")
    if not session.gpu:
        session.note("step", "NOT RUN", "needs a GPU")
        return session.close()
    section("A training step", ABOUT)
    lines, shared = list[Record](), stamp.columns(session.device)
    try:
        for line in measure_steps(Task(session.device), options.batch, options.budget, STAGES, EFFORT):
            lines.append(dataclasses.replace(line, **shared))
            records.append(session.folder / "step.csv", lines[-1:])
    except KeyboardInterrupt:
        paragraph("Stopped: what follows is what was measured until then.")
    report.show_steps(records.frame(lines))
    faults, compared = disagreeing(lines), any(line.loss_apart is not None for line in lines)
    text = f"{sum(line.status == MEASURED for line in lines)} of {len(lines)} measured, "
    text += "all losses agree" if compared else "and no losses to compare"
    state = "FAIL" if faults else "PASS" if compared else "NOT RUN"
    session.note("step", state, "; ".join(faults) or text)
    return session.close()
