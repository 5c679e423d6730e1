"""Variants of a network's training step at one batch size, made ready and measured together."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks import model_losses, model_training
from benchmarks.model_training import Run, Step
from benchmarks.model_variants import Task, Variant
from benchmarks.stopwatch import Stopwatch

T = TypeVar("T")
MODES = ("eager", "graph")
FEWEST_ROUNDS = 3  # for quartiles to mean something, even if the time is up


@dataclass(frozen=True)
class Effort:
    """rounds: at most; steps: timed together in a round; losses: steps compared; orders: see model_losses."""

    rounds: int = 12
    steps: int = 3
    losses: int = model_losses.STEPS
    orders: int = model_losses.ORDERS


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
    if device.type == "cuda":
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
        self._reference: Tensor | None = None
        self._effort, self._time_is_up, self._tick = effort, time_is_up, tick
        self._gpu = task.device.type == "cuda"

    def measure(self, stopwatch: Stopwatch) -> None:
        """Fills in the contestants; those without samples or a failure were not reached."""
        with excused(*self.contestants):
            self._x, self._labels = model_training.batch_of(self.task, self.batch)
            self._pool = torch.cuda.graph_pool_handle() if self._gpu else None
        for eager, graph in zip(self.contestants[::2], self.contestants[1::2], strict=True):
            if self._time_is_up():
                eager.failure = graph.failure = "no time left"
            if not eager.failure:
                self._prepare(eager, graph)
            if eager is self.contestants[0]:
                with excused(eager):
                    self._judge_by(eager)
            self._tick()
        self._time([each for each in self.contestants if not each.failure], stopwatch)

    def apart(self, contestant: Contestant) -> float | None:
        """Its losses from the reference's; None for the reference itself, and where there is nothing to hold
        together."""
        losses, reference = contestant.losses, self._reference
        if not contestant.variant.norms or losses is None or reference is None or losses is reference:
            return None
        return model_losses.apart(losses, reference)

    def _prepare(self, eager: Contestant, graph: Contestant) -> None:
        with excused(eager, graph):
            step = Step(eager.variant, self.task, self._x, self._labels)
            eager.ran = graph.ran = eager.variant.ran(self.task, self.batch)
            step.warm_up()
            with excused(eager):
                eager.peak, _ = self._peak(step, step)
                self._enter(eager, step, step)
            with excused(graph):
                graph.peak, replay = self._peak(step, lambda: model_training.captured(step, self._pool))
                self._enter(graph, step, replay)
        if eager.failure:
            free(self.task.device)

    def _enter(self, contestant: Contestant, step: Step, run: Run) -> None:
        contestant.losses = model_losses.curve(step, run, self._effort.losses)
        contestant.step, contestant.run = step, run

    def _judge_by(self, eager: Contestant) -> None:
        if eager.step is None or eager.losses is None:
            return
        self._reference = eager.losses
        self.allowed = model_losses.allowed(
            eager.step, self._x, self._labels, eager.losses, self._effort.orders
        )

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
