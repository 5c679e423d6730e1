"""Between a call and its kernels: which launch plan it finds, which workspace it uses, how threads share
them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast.functional import batch_norm
from bnfast.kernels import batch_norm as kernels
from bnfast.kernels import launch, launch_plan
from bnfast.ops import op
from tests.support.buffers import assert_same_bits, bit_identical, shifted
from tests.support.layers import data

OPERATORS = torch.ops.bnfast
SHAPE = (4, 8, 4, 4)


def test_a_tensor_on_another_device_is_entered_once_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, so a call makes the tensor's the current one. The device is made
    up here: tests/gpu has one test with two devices."""
    entered, inside = [], []

    @contextlib.contextmanager
    def device(index: torch.device) -> Iterator[None]:
        entered.append(index)
        inside.append(index)
        yield
        inside.pop()

    monkeypatch.setattr(op, "elsewhere", lambda x: not inside)
    monkeypatch.setattr(torch.cuda, "device", device)
    x = data(4, 6).requires_grad_()
    expected = torch.nn.functional.layer_norm(x, (6,))
    y = bnfast.functional.layer_norm(x, (6,))
    assert entered == [x.device]
    y.sum().backward()
    assert entered == [x.device] * 2
    torch.testing.assert_close(y, expected)


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
        vectors = [shifted(data(8, seed=n).abs(), elements) for n in range(4)]
        assert {v.data_ptr() % 16 for v in vectors} == {4 * elements}
        results.append(run(x, dy, vectors, training))
        assert len(nothing_known) == 2  # a launch plan each way, found again
    assert all(step.first._bind_once for step in nothing_known.values())
    for other in results[1:]:
        assert all(bit_identical(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("unaligned", ["x", "dy"])
def test_data_off_a_boundary_has_launches_of_its_own(unaligned: str, nothing_known: dict) -> None:
    x, dy = data(*SHAPE), data(*SHAPE, seed=1)

    def vectors() -> list[Tensor]:
        return [data(8, seed=n).abs() for n in range(4)]

    expected = run(x, dy, vectors(), True)
    moved = (shifted(x, 1), dy) if unaligned == "x" else (x, shifted(dy, 1))
    found = run(*moved, vectors(), True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    aligned = [step.first._bind_once for step in nothing_known.values()]
    assert aligned == ([True, True, False, False] if unaligned == "x" else [True, True, False])


@pytest.mark.parametrize("kind", ["operators", "compiled", "eager"])
def test_operators_never_use_the_cached_workspace(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph's warm-up allocates dies with the graph's pool; eager steps keep theirs."""
    asked = []
    get = launch.workspace
    monkeypatch.setattr(kernels, "workspace", lambda *args: (asked.append(args[-1]), get(*args))[1])
    x, dy = data(*SHAPE), data(*SHAPE, seed=1)
    if kind == "operators":
        mean, variance, batches = torch.zeros(8), torch.ones(8), torch.tensor(0)
        arguments = (None, None, mean, variance, batches, 0.1, 1e-5, None, False, True)
        _, stats, _ = OPERATORS.batch_norm_train(x, *arguments)
        OPERATORS.batch_norm_eval(x, None, None, mean, variance, 1e-5, False)
        for training in (True, False):
            rest = (None, None, training, True, torch.float32, torch.float32)
            OPERATORS.batch_norm_backward(x, dy, stats, *rest)
        expected = [True] * 3  # eval's forward needs none
    else:
        module = bnfast.BatchNorm2d(8)
        torch._dynamo.reset()
        call = torch.compile(module, backend="aot_eager", fullgraph=True) if kind == "compiled" else module
        call(x.requires_grad_()).backward(dy)
        expected = [kind == "compiled"] * 2
    assert asked == expected


def test_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One a stream, grown, never shrunk; a private or a large one is not kept; semaphores begin at 0."""
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "is_capturing", lambda: False)
    monkeypatch.setattr(launch, "_workspaces", {})
    like = torch.empty(0)

    def get(stream: int, partials: int = 10, blocks: int = 2, private: bool = False) -> tuple[Tensor, Tensor]:
        found, semaphores = launch.workspace(-1, stream, like, partials, blocks, private)
        assert found.numel() >= partials
        assert semaphores.numel() >= blocks
        assert not semaphores.any()
        return found, semaphores

    first = get(1)
    assert get(1)[1] is first[1]
    assert get(2)[1] is not first[1]
    mine, other = get(1, private=True), get(1, private=True)
    assert len({t.data_ptr() for _, t in (first, mine, other)}) == 3
    assert get(1)[1] is first[1]
    large = get(1, partials=100_000)
    assert get(1, blocks=5000)[0].numel() >= large[0].numel()
    too_large = get(1, partials=launch.KEPT + 1)
    assert get(1, partials=launch.KEPT + 1)[1] is not too_large[1]
    assert get(1)[0].numel() == large[0].numel()
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    assert get(1)[1] is not get(1)[1]


def train(seed: int, start: threading.Barrier) -> dict[str, Tensor]:
    module = bnfast.BatchNorm2d(8, momentum=None)
    x, dy = data(*SHAPE, seed=seed).requires_grad_(), data(*SHAPE, seed=seed + 100)
    start.wait()
    for _ in range(3):
        y = module(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert module.num_batches_tracked == 3
    return {"y": y.detach(), "dx": dx, **dict(module.named_buffers())}


def test_host_threads_at_once() -> None:
    """At the first call too, in which all of them plan."""
    expected = [train(seed, threading.Barrier(1)) for seed in range(4)]
    launch_plan.forget_plans()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(train, range(4), [threading.Barrier(4)] * 4))
    for ours, value in zip(found, expected, strict=True):
        assert_same_bits(ours, value)
