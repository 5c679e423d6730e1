"""A training step of ResNet-50 (resnet.py), with torch.nn, torch.compile and bnfast: its time and its memory,
once it is known to train as torch.nn's does.

Time: a sample begins with the weights before the first step and one step that is not timed, so that the clock
never starts on an idle device; then a few steps run between two events. The variants of a stage, eager and as
a graph, are sampled in turns. The figure is the median over rounds, per step.

cuDNN may try algorithms (torch.backends.cudnn.benchmark), as it may where people train at one size."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bnfast
from benchmarks import timing
from benchmarks.measure import WRONG
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.resnet import COMPILED, PLAIN, TORCH, Task, Variant, network, wide
from benchmarks.session import progress
from benchmarks.timing import Spread, one_line
from bnfast import dispatch
from codegen.cases import NAMES

Run = Callable[[], Tensor]  # one training step, its loss
STAGES = (PLAIN, COMPILED)
BATCHES = (256, 64, 32)
MODES = ("eager", "graph")
FEWEST_ROUNDS = 3  # for quartiles to mean something, even if the time is up
WARM_UP = 3  # steps: the first compiles and tries algorithms, the second has momentum to add to
LEARNING_RATE, MOMENTUM = 0.01, 0.9
FACTOR = 3.0


@dataclass(frozen=True)
class Effort:
    """rounds: at most; steps: timed together in a round; losses: steps compared; orders: of the batch."""

    rounds: int = 12
    steps: int = 3
    losses: int = 20
    orders: int = 3


EFFORT = Effort()


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

    def ready(self, mode: str, pool: Any) -> tuple[Run, int]:
        """The step, warmed up before, in one of MODES, and the bytes allocated at its peak.

        pool: memory that graphs share, since several steps' activations would not fit beside one another.
        That is sound as long as they never run at once, and the loss of one is read before another runs."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if mode == "eager":
            run: Run = self
            self()
        else:
            graph, loss = timing.captured(self, pool)

            def run() -> Tensor:
                graph.replay()
                return loss

        torch.cuda.synchronize()
        return run, torch.cuda.max_memory_allocated() - before


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
    """A variant in one mode. record: what is known of it so far; CANNOT, with the reason, if it cannot be
    measured. losses: of its first steps. samples: microseconds a step."""

    record: Record
    step: Step | None = None
    run: Run | None = None
    losses: Tensor | None = None
    samples: list[float] = field(default_factory=list)

    def fail(self, why: str) -> None:
        self.record, self.step, self.run = replace(self.record, status=CANNOT, note=why), None, None

    def compare(self, reference: Tensor, limit: float) -> None:
        if self.losses is None:
            return
        found = apart(self.losses, reference)
        self.record = replace(self.record, loss_apart=found, loss_allowed=limit)
        if not found <= limit:
            self.fail(f"{WRONG}: losses are {found:.1e} apart, {limit:.1e} allowed")

    def sample(self, steps: int) -> None:
        if self.step is not None and self.run is not None:
            self.step.reset()
            self.run()
            self.samples.append(stopwatch(timing.repeated(self.run, steps)) / steps)

    def result(self) -> Record:
        return self.record if self.run is None else replace(self.record, **Spread.of(self.samples).columns())


@contextlib.contextmanager
def excused(contestants: Sequence[Contestant]) -> Iterator[None]:
    """Whatever is raised inside becomes the reason why these cannot be measured."""
    try:
        yield
    except Exception as error:
        for contestant in contestants:
            contestant.fail(one_line(error))


def make_ready(contestants: Sequence[Contestant], step: Step, losses: int, pool: Any) -> None:
    """Of one variant, in all modes."""
    timing.on_a_side_stream(timing.repeated(step, WARM_UP))  # as a capture wants it
    free()  # what is cached for that stream is of no use to others
    for each in contestants:
        with excused([each]):
            run, peak = step.ready(each.record.mode, pool)
            each.losses = curve(step, run, losses)
            each.record, each.step, each.run = replace(each.record, peak_MB=peak / 1e6), step, run


def measure_stage(
    task: Task, size: int, variants: Sequence[Variant], effort: Effort, end: float
) -> list[Record]:
    """A failure of one contestant is its own. The first variant's eager losses are the reference of all."""
    batch, pool = task.batch(size), torch.cuda.graph_pool_handle()
    contestants: list[Contestant] = []
    for variant in progress(variants, desc=f"batch {size}, making ready"):
        own = [Contestant(beginning(task, variant, mode, batch[0])) for mode in MODES]
        contestants += own
        with excused(own):
            if monotonic() >= end:
                raise TimeoutError("no time left")
            make_ready(own, Step(variant, task, *batch), effort.losses, pool)
        free()
    first, *others = contestants
    if first.losses is not None:
        with excused([first]):
            limit = allowed(task, *batch, first.losses, effort.orders)
            for each in others:
                each.compare(first.losses, limit)
    for number in progress(range(effort.rounds), desc=f"batch {size}, rounds"):
        if number >= FEWEST_ROUNDS and monotonic() >= end:
            break
        for each in reversed(contestants) if number % 2 else contestants:
            with excused([each]):
                each.sample(effort.steps)
    return [each.result() for each in contestants]


def who(variant: Variant, x: Tensor) -> str:
    """Who computes the normalization in a network that is given x."""
    if variant.change not in (bnfast.fuse, bnfast.convert):
        return "torch"
    return "plain torch" if dispatch.reason_for_torch(x) else "bnfast's kernels"


def beginning(task: Task, variant: Variant, mode: str, x: Tensor) -> Record:
    return Record(
        "step", MEASURED, variant.name, network="ResNet-50", norm="BatchNorm",
        shape="x".join(map(str, x.shape)), dtype=NAMES[task.dtype], layout="channels_last",
        activation="relu", direction="step", mode=mode, ran=who(variant, x),
    )  # fmt: skip


def free() -> None:
    """Gives back what is referred to no more."""
    gc.collect()  # modules refer to one another in circles
    torch.cuda.empty_cache()


def stopwatch(work: Callable[[], object]) -> float:
    """Unlike timing.on_gpu it neither waits for an idle device first nor gives the host a start."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def measure_steps(
    task: Task, batches: Sequence[int], seconds: float = math.inf,
    stages: Sequence[Sequence[Variant]] = STAGES, effort: Effort = EFFORT,
) -> Iterator[Record]:  # fmt: skip
    """A record for each variant, mode and batch size, as soon as a stage is measured at a batch size. Each
    stage has its number in `suite`. seconds: nothing new is begun after them; what was is ended, with few
    rounds."""
    end = monotonic() + seconds
    for (number, variants), size in itertools.product(enumerate(stages, 1), batches):
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            found = measure_stage(task, size, variants, effort, end)
        torch.compiler.reset()
        free()
        yield from (replace(each, suite=f"stage {number}") for each in found)
