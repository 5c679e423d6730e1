"""How time is read: rounds in turn, spreads, the GPU's clock and not the host's; and captures that fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from benchmarks import measure, timing
from benchmarks.baselines import Provider
from benchmarks.records import CANNOT, MEASURED
from codegen.cases import Case
from tests.support.clock import Clock

CPU = torch.device("cpu")


def test_a_spread_is_median_and_quartiles() -> None:
    """One sample is its own quartiles."""
    assert timing.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Spread(3.0, 2.0, 4.0, 5)
    assert timing.Spread.of([3.0]) == timing.Spread(3.0, 3.0, 3.0, 1)
    with pytest.raises(ValueError, match="samples are empty"):
        timing.Spread.of([])


def test_all_take_turns_and_only_work_is_timed() -> None:
    clock, order = Clock(), []

    def timed(name: str, microseconds: float, calls: int) -> timing.Timed:
        def work() -> None:
            order.append(name)
            clock.work(microseconds * calls)

        return timing.Timed(work, calls, lambda: clock.work(7))

    todo = {"a": timed("a", 3, calls=2), "b": timed("b", 5, calls=1)}
    samples = timing.in_turn(todo, clock.stopwatch, 3)
    assert samples == {"a": [3] * 3, "b": [5] * 3}
    assert order == (["a", "b", "b", "a"] * (3 + timing.WARM_UP))[: 2 * (3 + timing.WARM_UP)]


class Gpu:
    """Waits for 5000 us and does each piece of work in 10, beside a host that takes `launch` to queue one."""

    def __init__(self, launch: float) -> None:
        self.host = self.done = 0.0
        self.launch = launch

    def synchronize(self) -> None:
        self.host = self.done = max(self.host, self.done)

    def sleep(self, cycles: int) -> None:
        self.done = self.host + cycles / 2000

    def work(self) -> None:
        self.host += self.launch
        self.done = max(self.host, self.done) + 10

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(synchronize=self.synchronize)
        event.record = lambda: setattr(event, "time", max(self.host, self.done))
        event.query = lambda: event.time <= self.host
        event.elapsed_time = lambda later: (later.time - event.time) / 1e3
        return event


@pytest.mark.parametrize(("calls", "launch", "us", "late"), [
    (16, 300, 10, ""), (10, 10, 10, ""), (16, 400, 88.125, "3 of 3 readings may be the host's time"),
])  # fmt: skip
def test_a_gpu_is_read_and_not_the_host_or_it_is_told(
    calls: int, launch: float, us: float, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel takes 10 us, and that is what is read, as long as the host queues all of them within the 5 ms
    that the GPU waits at first."""
    gpu = Gpu(launch)
    for name, value in {"Event": gpu.event, "synchronize": gpu.synchronize, "_sleep": gpu.sleep}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    work = timing.Timed(timing.repeated(gpu.work, calls), calls)
    (found,) = timing.in_turn({0: work}, timing.on_gpu, 3).values()
    assert found == pytest.approx([us] * 3)
    assert timing.lateness(found) == late


def test_a_rotation_is_cold_in_the_largest_cache_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200's L2 has 60 MB, and a buffer must not find a line of its last use in there. What empties a
    cache reads as much as lies between two uses."""
    assert timing.COLD_BYTES >= 4 * 60 * 1024**2
    for size in (1000, 2**20, 2**28, 2**40):
        assert (timing.rotation(size) - 1) * size >= timing.COLD_BYTES
        assert timing.rotation(size) >= 2
    monkeypatch.setattr(timing, "COLD_BYTES", 4096)
    assert float(timing.evicting(CPU)()) == 1024  # type: ignore[arg-type]  # a sum of ones


# captures, with a stand-in for torch.cuda's graphs that ends a failed one as torch does

ERROR = "CUDA error: operation failed due to a previous error during capture"


class Stream:
    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class Cuda:
    """The current stream. A capture has one of its own, which stays the current one where it fails."""

    def __init__(self) -> None:
        self.default = self.current = Stream()

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: object, pool: object = None) -> Iterator[None]:
        before, self.current = self.current, Stream()
        try:
            yield
        except Exception:
            raise RuntimeError(ERROR) from None
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()
    graph = SimpleNamespace(replay=lambda: None)
    replaced = {"current_stream": lambda: found.current, "Stream": Stream, "CUDAGraph": lambda: graph}
    for name, value in {**replaced, "stream": found.stream, "graph": found.graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_work_is_captured_on_a_stream_of_its_own(cuda: Cuda) -> None:
    _, seen = timing.captured(lambda: cuda.current)
    assert seen is not cuda.default
    assert cuda.current is cuda.default


def test_a_provider_whose_capture_fails_is_named_and_the_next_is_captured(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in its backward, with an output in hand, and not in the call before the capture. The reason is
    its own, and the stream what it was."""
    case = Case("BatchNorm", (2, 4, 3, 3), 0, torch.float32, True)
    bad, good = (measure.Ready(name, Provider("torch", lambda x, z: x * 2, [])) for name in ("bad", "good"))
    calls = [measure.Calls(each.provider, measure.Tensors.of(case, CPU, 1)) for each in (bad, good)]
    once = Mock(side_effect=[None, ValueError("the reason")])
    monkeypatch.setattr(calls[0], "backward", once)
    method = measure.Method(rounds=5, stopwatch=lambda work: (work(), 1.0)[1])
    found = list(measure.in_graphs({"kind": "layer"}, 1, [bad, good], calls, [0, 0], method, timing.nothing))
    assert [(r.variant, r.status, r.note) for r in found] == [
        ("bad", CANNOT, "ValueError: the reason"), ("good", MEASURED, ""),
    ]  # fmt: skip
    assert calls[0].outputs == []
    assert cuda.current is cuda.default
