"""A case timed with several providers: the same tensors for all of them, in turns, with L2 cold and warm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, cudnn, fairness, timing
from benchmarks.baselines import Baseline, Provider
from benchmarks.cases import columns
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.timing import ROUNDS, Spread, Stopwatch, Timed, Work, in_turn, nothing, one_line, rotation
from codegen.cases import DIRECTIONS, Case

BASELINES: dict[str, Baseline] = {each.name: each for each in (*baselines.ALL, cudnn.FRONTEND)}
WARM_CALLS = 10  # of one buffer, between two events
# of different buffers: so few that the host queues them within the stopwatch's head start, if one takes it
# less than 300 us, and that the GPU's queue of launches holds them
MOST_COLD_CALLS = 16
WRONG = "its results are wrong"
HELD_BYTES = 80 * 1024


def get(names: Sequence[str]) -> list[Baseline]:
    """By name, in this order. ValueError for a name that nobody has."""
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(f"names must be of {', '.join(BASELINES)}, got {', '.join(unknown)}")
    return [BASELINES[name] for name in names]


@dataclass(frozen=True)
class Method:
    """rounds: readings of each figure. caches: L2 as a call finds it, "cold" (buffers take turns, so that it
    finds nothing of its own; where they are too few for that, other memory is read before) and "warm" (one
    buffer again and again). graph: time a captured CUDA graph too."""

    rounds: int = ROUNDS
    caches: tuple[str, ...] = ("cold", "warm")
    directions: tuple[str, ...] = DIRECTIONS
    graph: bool = True
    stopwatch: Stopwatch = timing.on_gpu


@dataclass(frozen=True)
class Tensors:
    """What all providers of a case are given: as many of each as it takes until the first is cold again."""

    x: Sequence[Tensor]
    z: Sequence[Tensor | None]
    dy: Sequence[Tensor]

    @classmethod
    def of(cls, case: Case, device: torch.device, count: int) -> Tensors:
        def random(first: int) -> list[Tensor]:
            return [case.tensor(device, first + number) for number in range(count)]

        z = [t.requires_grad_() for t in random(1000)] if case.residual else [None] * count
        return cls([t.requires_grad_() for t in random(0)], z, random(2000))


def floor_bytes(case: Case, direction: str) -> int:
    """What the work must move, whoever does it: x twice and y once; backward dy and x twice and dx once. Each
    is read once where a group of a sample fits one SM's registers beside what is computed with it. A
    residual adds z; backward, dz, which is written and then read in dy's place."""
    passes, held, tensors = {"forward": (3, 2, 1), "backward": (5, 3, 2)}[direction]
    if case.norm != "BatchNorm" and case.x_bytes // (case.shape[0] * case.groups) * tensors <= HELD_BYTES:
        passes = held
    return (passes + case.residual) * case.x_bytes


class Calls:
    """One provider's forward and backward over the tensors of a case."""

    def __init__(self, provider: Provider, tensors: Tensors) -> None:
        self.provider, self.tensors = provider, tensors
        self.outputs: list[Tensor] = []

    def forward(self, numbers: Sequence[int]) -> None:
        x, z = self.tensors.x, self.tensors.z
        for number in numbers:
            self.outputs.append(self.provider.forward(x[number], z[number]))

    def backward(self, numbers: Sequence[int]) -> None:
        """Of what `forward` of the same numbers has left in `outputs`."""
        for number, y in zip(numbers, self.outputs, strict=True):
            z = self.tensors.z[number]
            leaves = [self.tensors.x[number], *([] if z is None else [z]), *self.provider.parameters]
            torch.autograd.grad(y, leaves, self.tensors.dy[number])

    def both(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.forward([number])
            self.backward([number])
            self.outputs.clear()

    def timed(self, direction: str, numbers: Sequence[int], evict: Work = nothing) -> Timed:
        """evict: the last thing before the clock starts."""
        forward = partial(self.forward, numbers)
        if direction == "forward":
            return Timed(forward, len(numbers), evict, self.outputs.clear)

        def prepare() -> None:
            forward()
            evict()

        return Timed(partial(self.backward, numbers), len(numbers), prepare, self.outputs.clear)


@dataclass(frozen=True)
class Ready:
    """Somebody who can run the case. copied_MB: beside the work; None where nobody looked. note: on the
    layout of what it returns."""

    name: str
    provider: Provider
    copied_MB: float | None = None
    note: str = ""

    def record(self, shared: dict[str, Any], samples: Sequence[float], floor: int) -> Record:
        """shared: the columns that say what was timed."""
        time = Spread.of(samples)
        return Record(
            **shared, status=MEASURED, variant=self.name, ran=self.provider.ran, copied_MB=self.copied_MB,
            note="; ".join(filter(None, (self.note, timing.lateness(samples)))),
            floor_bytes=floor, GBps=round(floor / time.us / 1e3, 1), **time.columns(),
        )  # fmt: skip


def ready(case: Case, baselines: Sequence[Baseline], device: torch.device) -> Iterator[Ready | Record]:
    """Those that can run the case; for the others a record that says why they cannot. Nobody is timed whose
    results are wrong."""
    for afresh in dict.fromkeys(baseline.afresh for baseline in baselines):
        afresh()
    for baseline in baselines:
        cannot = partial(Record, **columns(case), status=CANNOT, variant=baseline.name)
        why = baseline.unable(case, device)
        if why is not None:
            yield cannot(note=why)
            continue
        try:
            provider = baseline.build(case, device)
            found = fairness.step(provider, case, device)
            wrong = fairness.checked(found, case, device)
            if wrong is not None:
                yield cannot(ran=provider.ran, note=f"{WRONG}: {wrong}")
                continue
            copied = round(fairness.copies(provider, case, device) / 1e6, 3) if provider.countable else None
            yield Ready(baseline.name, provider, copied, fairness.strayed(found, case))
        except Exception as e:
            yield cannot(note=one_line(e))


def of_case(
    case: Case, baselines: Sequence[Baseline], device: torch.device, method: Method
) -> Iterator[Record]:
    """Everything that is measured of one case. A provider that fails on the way, for memory say, is named in
    a record of its own, and the others go on."""
    providers: list[Ready] = []
    for found in ready(case, baselines, device):
        if isinstance(found, Record):
            yield found
        else:
            providers.append(found)
    for cache in method.caches:
        whole = rotation(case.x_bytes) if cache == "cold" else 1
        count = min(whole, MOST_COLD_CALLS)
        evict = timing.evicting(device) if count < whole else nothing
        tensors = Tensors.of(case, device, count)
        numbers = list(range(count)) if cache == "cold" else [0] * WARM_CALLS
        calls = [Calls(each.provider, tensors) for each in providers]
        shared = {**columns(case), "cache": cache}
        for direction in method.directions:
            timed = {i: each.timed(direction, numbers, evict) for i, each in enumerate(calls)}
            samples = in_turn(timed, method.stopwatch, method.rounds)
            own = {**shared, "direction": direction, "mode": "eager"}
            for i, each in enumerate(providers):
                once = host_and_peak(calls[i], direction, device) if cache == "cold" else {}
                yield each.record({**own, **once}, samples[i], floor_bytes(case, direction))
        if method.graph and timing.is_gpu(device):
            own = {**shared, "direction": "both", "mode": "graph"}
            floor = sum(floor_bytes(case, direction) for direction in DIRECTIONS)
            yield from in_graphs(own, floor, providers, calls, numbers, method, evict)
        del tensors, calls
        if timing.is_gpu(device):
            torch.cuda.empty_cache()


def host_and_peak(calls: Calls, direction: str, device: torch.device) -> dict[str, float]:
    """Host time of an eager call, and on a GPU the memory that its direction takes at most beyond what is
    there already."""
    timed = calls.timed(direction, [0])
    found = {"host_us": host_us(timed)}
    if timing.is_gpu(device):
        timed.prepare()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed.work()
        found["peak_MB"] = round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 3)
        timed.clean()
    return found


def host_us(timed: Timed) -> float:
    """The host's microseconds of a call."""
    return round(Spread.of(in_turn({0: timed}, timing.on_host, rounds=10)[0]).us, 2)


def in_graphs(
    shared: dict[str, Any], floor: int, providers: Sequence[Ready], calls: Sequence[Calls],
    numbers: Sequence[int], method: Method, evict: Work,
) -> Iterator[Record]:  # fmt: skip
    """Forward with backward, captured and replayed: the same work, nothing of the host between launches."""
    graphs: dict[int, Timed] = {}
    for i, (each, own) in enumerate(zip(providers, calls, strict=True)):
        try:
            timing.on_a_side_stream(partial(own.both, numbers[:1]))
            graph, _ = timing.captured(partial(own.both, numbers))
            graphs[i] = Timed(graph.replay, len(numbers), evict)
        except Exception as e:
            own.outputs.clear()
            yield Record(**shared, status=CANNOT, variant=each.name, ran=each.provider.ran, note=one_line(e))
    samples = in_turn(graphs, method.stopwatch, method.rounds)
    for i, timed in graphs.items():
        yield providers[i].record({**shared, "host_us": host_us(timed)}, samples[i], floor)
