"""A capture that fails, with a stand-in for torch.cuda's graphs that ends one as torch does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch

from benchmarks import graphs, measure
from benchmarks.baselines.contender import Contender
from benchmarks.records import CANNOT, MEASURED
from codegen.cases import Case

CPU = torch.device("cpu")
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
    _, seen = graphs.captured(lambda: cuda.current)
    assert seen is not cuda.default
    assert cuda.current is cuda.default


def test_a_capture_that_fails_says_why_and_leaves_the_stream(cuda: Cuda) -> None:
    def work() -> None:
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        graphs.captured(work)
    assert cuda.current is cuda.default


def test_a_contender_whose_capture_fails_is_named_and_the_next_is_captured(cuda: Cuda) -> None:
    """It fails in its backward, with an output in hand, and not in the call before the capture."""
    case = Case("suite", "network", "BatchNorm", (2, 4, 3, 3), 0, torch.float32, True)
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
    found = list(measure.in_graphs(case, [bad, good], calls, [0, 0], "warm", method, lambda: None))
    assert [(r.variant, r.status, r.note) for r in found] == [
        ("bad", CANNOT, "RuntimeError: not while capturing"), ("good", MEASURED, ""),
    ]  # fmt: skip
    assert calls[0].outputs == []
    assert cuda.current is cuda.default
