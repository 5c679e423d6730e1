"""A case timed with several providers: the same tensors for all of them, in turns, with L2 cold and warm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, cudnn, fairness, timing
from benchmarks.baselines import Baseline, Inputs, Provider, inputs
from benchmarks.cases import columns
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.timing import ROUNDS, Spread, Stopwatch, Timed, Work, in_turn, nothing, one_line
from codegen.cases import DIRECTIONS, Case

BASELINES: dict[str, Baseline] = {each.name: each for each in (*baselines.ALL, cudnn.FRONTEND)}
WARM_CALLS = 10  # of one buffer, between two events
# between two events: so few that the host queues them within the stopwatch's head start, if one takes it less
# than 300 us, and that the GPU's queue of launches holds them
MOST_COLD_CALLS = 16
WRONG = "its results are wrong"
HELD_BYTES = 80 * 1024


def get(names: Sequence[str]) -> list[Baseline]:
    """By name, in this order."""
    return [BASELINES[name] for name in names]


@dataclass(frozen=True)
class Method:
    """rounds: readings of each figure. caches: L2 as a call finds it, "cold" (other memory was read before a
    reading, in which each call has buffers of its own) and "warm" (one buffer again and again). graph: time a
    captured CUDA graph too."""

    rounds: int = ROUNDS
    caches: tuple[str, ...] = ("cold", "warm")
    directions: tuple[str, ...] = DIRECTIONS
    graph: bool = True
    stopwatch: Stopwatch = timing.on_gpu


def floor_bytes(case: Case, direction: str) -> int:
    """What the work must move, whoever does it: x twice and y once; backward dy and x twice and dx once. Each
    is read once where a group of a sample fits one SM's registers beside what is computed with it. A
    residual adds z; backward, dz, which is written and then read in dy's place."""
    if direction == "both":
        return sum(floor_bytes(case, each) for each in DIRECTIONS)
    passes, held, tensors = {"forward": (3, 2, 1), "backward": (5, 3, 2)}[direction]
    if case.norm != "BatchNorm" and case.x_bytes // (case.shape[0] * case.groups) * tensors <= HELD_BYTES:
        passes = held
    return (passes + case.residual) * case.x_bytes


def ready(
    case: Case, baselines: Sequence[Baseline], device: torch.device
) -> Iterator[tuple[Record, Provider | None]]:
    """Those that can run the case, with what is known before they are timed; for the others a record that
    says why they cannot, and None. Nobody is timed whose results are wrong."""
    if any(baseline.compiled for baseline in baselines):
        # all cases are the same code to torch.compile, which gives up after a few versions of it, and looks
        # through all of them at each call
        torch.compiler.reset()
    for baseline in baselines:
        record = Record(**columns(case), status=CANNOT, variant=baseline.name)
        why = baseline.unable(case, device)
        if why is not None:
            yield replace(record, note=why), None
            continue
        try:
            provider = baseline.build(case, device)
            record = replace(record, ran=provider.ran)
            found = fairness.step(provider, case, device)
            wrong = fairness.checked(found, case, device)
            if wrong is not None:
                yield replace(record, note=f"{WRONG}: {wrong}"), None
                continue
            if not baseline.compiled:
                copied = fairness.copies(provider, case, device)
                record = replace(record, copied_MB=round(copied / 1e6, 3))
            yield replace(record, status=MEASURED, note=fairness.strayed(found, case)), provider
        except Exception as e:
            yield replace(record, note=one_line(e)), None


@dataclass
class Calls:
    """Forwards and backwards of one provider over several inputs, which all providers share. record: of the
    provider, before it is timed."""

    record: Record
    provider: Provider
    inputs: Sequence[Inputs]
    outputs: list[Tensor] = field(default_factory=list)

    def forward(self) -> None:
        self.outputs += [self.provider.forward(x, z) for x, z, _ in self.inputs]

    def backward(self) -> None:
        """Of what `forward` has left in `outputs`."""
        for y, given in zip(self.outputs, self.inputs, strict=True):
            self.provider.backward(y, *given)

    def both(self) -> None:
        for x, z, dy in self.inputs:
            self.provider.backward(self.provider.forward(x, z), x, z, dy)

    def timed(self, direction: str, mode: str, evict: Work) -> Timed:
        """mode: "eager", or "graph" for both directions, captured and replayed: the same work, nothing of the
        host between launches. evict: the last thing before the clock starts."""
        if mode == "graph":
            timing.on_a_side_stream(self.both)
            graph, _ = timing.captured(self.both)
            return Timed(graph.replay, len(self.inputs), evict)

        def prepare() -> None:
            if direction == "backward":
                self.forward()
            evict()

        return Timed(getattr(self, direction), len(self.inputs), prepare, self.outputs.clear)

    def measured(self, samples: Sequence[float], floor: int, **columns: Any) -> Record:
        """columns: what was timed."""
        time = Spread.of(samples)
        note = "; ".join(filter(None, (self.record.note, timing.lateness(samples))))
        columns |= {"note": note, "floor_bytes": floor, "GBps": round(floor / time.us / 1e3, 1)}
        return replace(self.record, **time.columns(), **columns)


def of_case(
    case: Case, baselines: Sequence[Baseline], device: torch.device, method: Method
) -> Iterator[Record]:
    """Everything that is measured of one case. A provider that fails on the way, for memory say, is named in
    a record of its own, and the others go on."""
    providers: list[tuple[Record, Provider]] = []
    for record, provider in ready(case, baselines, device):
        if provider is None:
            yield record
        else:
            providers.append((record, provider))
    for cache in method.caches:
        yield from of_cache(cache, case, providers, device, method)
        if timing.is_gpu(device):
            torch.cuda.empty_cache()


def of_cache(
    cache: str, case: Case, providers: Sequence[tuple[Record, Provider]], device: torch.device, method: Method
) -> Iterator[Record]:
    if cache == "cold":
        evict = timing.evicting(device)
        count = max(1, min(MOST_COLD_CALLS, timing.COLD_BYTES // case.x_bytes))
        given = [inputs(case, device, number) for number in range(count)]
    else:
        evict, given = nothing, [inputs(case, device)] * WARM_CALLS
    calls = {record.variant: Calls(record, provider, given) for record, provider in providers}
    ways = [(direction, "eager") for direction in method.directions]
    for direction, mode in ways + [("both", "graph")] * (method.graph and timing.is_gpu(device)):
        own: dict[str, Any] = {"cache": cache, "direction": direction, "mode": mode}
        timed: dict[str, Timed] = {}
        for name, each in calls.items():
            try:
                timed[name] = each.timed(direction, mode, evict)
            except Exception as e:  # of a capture
                yield replace(each.record, status=CANNOT, note=one_line(e), **own)
        samples = in_turn(timed, method.stopwatch, method.rounds)
        for name, work in timed.items():
            if cache == "cold":
                own["host_us"] = host_us(work)
            yield calls[name].measured(samples[name], floor_bytes(case, direction), **own)


def host_us(timed: Timed) -> float:
    """The host's microseconds of a call."""
    return round(Spread.of(in_turn({0: timed}, timing.on_host, rounds=10)[0]).us, 2)
