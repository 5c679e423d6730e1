"""Between a call and its kernels: which step it finds, whose workspace it uses, how threads share them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast.functional import batch_norm
from bnfast.kernels import launch, launch_plan
from tests.support import kernel_calls
from tests.support.buffers import bit_identical
from tests.support.layers import data

OPERATORS = torch.ops.bnfast
SHAPE = (4, 8, 4, 4)


def offset(t: Tensor, elements: int = 1) -> Tensor:
    held = t.new_empty(t.numel() + elements)[elements:].as_strided(t.shape, t.stride(), elements)
    return held.copy_(t)


@pytest.fixture
def nothing_known() -> Iterator[dict]:
    """The table of steps, emptied for the test."""
    launch_plan.forget_plans()
    yield launch_plan._plans
    launch_plan.forget_plans()


def run(x: Tensor, dy: Tensor, vectors: list[Tensor], training: bool) -> list[Tensor]:
    mean, variance, weight, bias = vectors
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = batch_norm(leaves[0], mean, variance, *leaves[1:], training=training)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), mean, variance]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_parameters_lie_anywhere_at_no_cost(training: bool, nothing_known: dict) -> None:
    """A weight cut from a flat buffer of all parameters: x is loaded in whole vectors all the same, by the
    very launches that an aligned weight has."""
    x, dy = data(*SHAPE), data(*SHAPE, seed=1)
    results = []
    for elements in (0, 1, 2, 3):
        vectors = [offset(data(8, seed=n).abs(), elements) for n in range(4)]
        assert {v.data_ptr() % 16 for v in vectors} == {4 * elements}
        results.append(run(x, dy, vectors, training))
        assert len(nothing_known) == 2  # a step each way, found again
    assert all(step.first._bind_once for step in nothing_known.values())
    for other in results[1:]:
        assert all(bit_identical(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("unaligned", ["x", "dy"])
def test_data_off_a_boundary_has_launches_of_its_own(unaligned: str, nothing_known: dict) -> None:
    x, dy = data(*SHAPE), data(*SHAPE, seed=1)

    def vectors() -> list[Tensor]:
        return [data(8, seed=n).abs() for n in range(4)]

    expected = run(x, dy, vectors(), True)
    found = run(
        offset(x) if unaligned == "x" else x, offset(dy) if unaligned == "dy" else dy, vectors(), True
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    aligned = [step.first._bind_once for step in nothing_known.values()]
    assert aligned == ([True, True, False, False] if unaligned == "x" else [True, True, False])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call asked for a workspace of its own."""
    return kernel_calls.workspaces_asked_for(monkeypatch)


@pytest.mark.parametrize("kind", ["operators", "compiled", "eager"])
def test_operators_never_use_the_cached_workspace(kind: str, asked: list[bool]) -> None:
    """What a graph's warm-up allocates dies with the graph's pool; eager steps keep theirs."""
    x, dy = data(*SHAPE), data(*SHAPE, seed=1)
    if kind == "operators":
        mean, variance, batches = torch.zeros(8), torch.ones(8), torch.tensor(0)
        arguments = (None, None, mean, variance, batches, False, 0.1, 1e-5)
        _, table, _ = OPERATORS.batch_norm_train(x, *arguments)
        OPERATORS.batch_norm_eval(x, None, None, mean, variance, 1e-5, False)
        for training in (True, False):
            OPERATORS.batch_norm_backward(x, dy, table, training, True, torch.float32, torch.float32)
        expected = [True] * 3  # eval's forward needs none
    else:
        module = bnfast.BatchNorm2d(8)
        torch._dynamo.reset()
        call = torch.compile(module, backend="aot_eager", fullgraph=True) if kind == "compiled" else module
        call(x.requires_grad_()).backward(dy)
        expected = [kind == "compiled"] * 2
    assert asked == expected


def test_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One a stream, grown, never shrunk; one's own and a large one are in no table; counters begin at 0."""
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "is_capturing", lambda: False)
    monkeypatch.setattr(launch, "_workspaces", {})
    seed = torch.empty(0)

    def get(stream: int, partials: int = 10, blocks: int = 2, own: bool = False) -> tuple[Tensor, Tensor]:
        partial, counters = launch.workspace(-1, stream, seed, partials, blocks, own)
        assert partial.numel() >= partials
        assert counters.numel() >= blocks
        assert not counters.any()
        return partial, counters

    first = get(1)
    assert get(1)[1] is first[1]
    assert get(2)[1] is not first[1]
    mine, other = get(1, own=True), get(1, own=True)
    assert len({t.data_ptr() for _, t in (first, mine, other)}) == 3
    assert get(1)[1] is first[1]
    large = get(1, partials=100_000)
    assert get(1, blocks=5000)[0].numel() >= large[0].numel()
    too_large = get(1, partials=launch.KEPT + 1)
    assert get(1, partials=launch.KEPT + 1)[1] is not too_large[1]
    assert get(1)[0].numel() == large[0].numel()
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    assert get(1)[1] is not get(1)[1]


THREADS, STEPS = 4, 3


def train(seed: int, start: threading.Barrier | None = None) -> dict[str, Tensor]:
    module = bnfast.BatchNorm2d(8, momentum=None)
    x, dy = data(*SHAPE, seed=seed).requires_grad_(), data(*SHAPE, seed=seed + 100)
    if start is not None:
        start.wait()
    for _ in range(STEPS):
        y = module(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    return {"y": y.detach(), "dx": dx, **dict(module.named_buffers())}


def test_host_threads_at_once() -> None:
    """At the first call too, in which all of them plan."""
    expected = [train(seed) for seed in range(THREADS)]
    launch_plan.forget_plans()
    start = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda seed: train(seed, start), range(THREADS)))
    for ours, value in zip(found, expected, strict=True):
        assert ours["num_batches_tracked"] == STEPS
        for name, tensor in value.items():
            assert bit_identical(ours[name], tensor), name
