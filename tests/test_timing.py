"""How time is read: rounds in turn, spreads, the GPU's clock and not the host's; and captures that fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure, timing
from benchmarks.baselines import Contender
from benchmarks.records import CANNOT, MEASURED
from codegen.cases import Case
from tests.support.clock import Clock

CPU = torch.device("cpu")


def test_a_spread_is_median_and_quartiles() -> None:
    assert timing.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Spread(3.0, 2.0, 4.0, 5)


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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch: float) -> None:
        self.host = self.done = 0.0
        self.launch = launch
        for name in ("Event", "synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def synchronize(self) -> None:
        self.host = self.done = max(self.host, self.done)

    def _sleep(self, cycles: int) -> None:
        self.done = self.host + cycles / 2000

    def work(self) -> None:
        self.host += self.launch
        self.done = max(self.host, self.done) + 10

    def Event(self, enable_timing: bool) -> Mark:
        assert enable_timing
        return Mark(self)


class Mark:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.time = gpu, 0.0

    def record(self) -> None:
        self.time = max(self.gpu.host, self.gpu.done)

    def query(self) -> bool:
        return self.time <= self.gpu.host

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.time)

    def elapsed_time(self, later: Mark) -> float:
        return (later.time - self.time) / 1e3


@pytest.mark.parametrize(("calls", "launch", "us", "late"), [
    (16, 300, 10, ""), (10, 10, 10, ""), (16, 400, 88.125, "3 of 3 readings may be the host's time"),
])  # fmt: skip
def test_a_gpu_is_read_and_not_the_host_or_it_is_told(
    calls: int, launch: float, us: float, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel takes 10 us, and that is what is read, as long as the host queues all of them within the 5 ms
    that the GPU waits at first."""
    gpu = Gpu(monkeypatch, launch)

    def work() -> None:
        for _ in range(calls):
            gpu.work()

    (found,) = timing.in_turn({0: timing.Timed(work, calls)}, timing.on_gpu, 3).values()
    assert found == pytest.approx([us] * 3)
    assert timing.lateness(found) == late


def test_a_rotation_is_cold_in_the_largest_cache_there_is() -> None:
    """An H200's L2 has 60 MB, and a buffer must not find a line of its last use in there."""
    assert timing.COLD_BYTES >= 4 * 60 * 1024**2
    for size in (1000, 2**20, 2**28, 2**40):
        assert (timing.rotation(size) - 1) * size >= timing.COLD_BYTES
        assert timing.rotation(size) >= 2


def test_what_empties_a_cache_reads_as_much_as_lies_between_two_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 4096)
    assert float(timing.evicting(torch.device("cpu"))()) == 1024  # type: ignore[arg-type]  # a sum of ones


def test_one_sample_is_its_own_quartiles() -> None:
    assert timing.Spread.of([3.0]) == timing.Spread(3.0, 3.0, 3.0, 1)
    with pytest.raises(ValueError, match="samples are empty"):
        timing.Spread.of([])


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


def test_a_capture_that_fails_says_why_and_leaves_the_stream(cuda: Cuda) -> None:
    def work() -> None:
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        timing.captured(work)
    assert cuda.current is cuda.default


def test_a_contender_whose_capture_fails_is_named_and_the_next_is_captured(cuda: Cuda) -> None:
    """It fails in its backward, with an output in hand, and not in the call before the capture."""
    case = Case("BatchNorm", (2, 4, 3, 3), 0, torch.float32, True)
    bad, good = (measure.Ready(name, Contender("torch", lambda x, z: x * 2, [])) for name in ("bad", "good"))
    tensors = measure.Tensors.of(case, CPU, 1)
    calls = [measure.Calls(each.contender, tensors) for each in (bad, good)]
    backward, warmed_up = calls[0].backward, []

    def refused(numbers: Sequence[int]) -> None:
        if warmed_up:
            raise RuntimeError("not while capturing")
        warmed_up.append(numbers)
        backward(numbers)

    calls[0].backward = refused  # type: ignore[method-assign]
    method = measure.Method(rounds=5, stopwatch=lambda work: (work(), 1.0)[1])
    found = list(measure.in_graphs({"kind": "layer"}, 1, [bad, good], calls, [0, 0], method, lambda: None))
    assert [(r.variant, r.status, r.note) for r in found] == [
        ("bad", CANNOT, "RuntimeError: not while capturing"), ("good", MEASURED, ""),
    ]  # fmt: skip
    assert calls[0].outputs == []
    assert cuda.current is cuda.default
