"""CUDA graphs, streams and host threads. Two launches that overlap must never meet in the same counters."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast import Activation, exact
from bnfast.checks import fp64, one_step
from bnfast.checks.cases import Case, Given, batch_renorm, given, group_norm, instance_norm, layer_norm
from bnfast.kernels.launch_plan import forget_plans
from tests.support import oracle
from tests.support.buffers import assert_same_bits, bit_identical
from tests.support.families import BF16, FP16, FP32, in_dtypes, layouts

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
REPEATS = 25
Named = dict[str, Tensor]

# Many programs a channel or group, so that what they share is in use for long.
# Two of a kind, with other data.
PAIRS = [
    [Case((32, 64, 28, 28), BF16, seed=seed) for seed in (0, 1)],
    [group_norm((8, 320, 28, 28), BF16, True, groups=32, seed=seed) for seed in (0, 1)],
]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str(pair[0]))
SPLIT = [
    PAIRS[0][0],
    Case((32, 64, 28, 28), FP32, channels_last=True),
    Case((64, 65, 7, 7), FP16, momentum=None),
    *layouts(
        batch_renorm((32, 64, 28, 28), BF16),
        group_norm((16, 64, 28, 28), FP32, groups=8),  # held, where it is contiguous
        group_norm((2, 64, 256, 256), BF16, groups=8),
        instance_norm((2, 32, 24, 24, 24), FP32, tracked=True),
        layer_norm((129, 768)),
        layer_norm((129, 20000)),
    ),
]
every_layer = pytest.mark.parametrize(
    "case",
    [
        SPLIT[0],
        replace(SPLIT[0], momentum=None),
        # its r and d are at limits that are others in each step
        batch_renorm((32, 64, 28, 28), mean=5.0, schedule=(3.0, 5.0, 0, 9, 9)),
        *layouts(group_norm((32, 64, 28, 28), groups=8)),
        instance_norm((32, 64, 28, 28), tracked=True),
        layer_norm((50, 96)),
    ],
    ids=str,
)


def made(case: Case, tensors: Given, activation: str | None = None) -> Any:
    """The case's layer. Where an activation follows, half of x is the residual."""
    module = one_step.layer(case, bnfast, tensors)
    if activation is not None:
        module.activation = Activation(activation)
        module.register_forward_pre_hook(lambda module, args: (*args, 0.5 * args[0]))
    return module


def eager(case: Case, tensors: Given, steps: int, activation: str | None = None) -> Named:
    """What `steps` steps on the default stream return and leave in the buffers."""
    module = made(case, tensors, activation)
    for _ in range(steps):
        result = one_step.step(module, tensors.x, tensors.dy)
    torch.cuda.synchronize()
    return {**result, **one_step.buffers(module)}


def recorded(work: Callable[[], Named]) -> tuple[torch.cuda.CUDAGraph, Named]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def replayed(graph: torch.cuda.CUDAGraph, result: Named) -> Named:
    graph.replay()
    return result


def captured(case: Case, tensors: Given, activation: str | None = None) -> tuple[torch.cuda.CUDAGraph, Named]:
    """(graph of a step, what it writes to). Other layers have run the same kernels before."""
    module = made(case, tensors, activation)
    graph, result = recorded(partial(one_step.step, module, tensors.x, tensors.dy))
    return graph, {**result, **one_step.buffers(module)}


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_replays_equal_eager_steps(case: Case, activation: str | None) -> None:
    """Output, gradients, running statistics and the batch counter, bit for bit, on other numbers than those
    that were captured."""
    tensors = given(case, CUDA)
    eager(case, tensors, 1, activation)
    graph, found = captured(case, tensors, activation)
    tensors.x.mul_(2).add_(3)
    expected = eager(case, tensors, REPEATS, activation)
    for _ in range(REPEATS):
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("case", in_dtypes(layouts(batch_renorm((6, 24, 14, 14))), (BF16, FP32)), ids=str)
def test_the_schedule_goes_on_within_a_graph(case: Case) -> None:
    """Each replay is a batch of its own: with running statistics that stay (momentum 0), what changes from
    one to the next is the limits, which the kernels read off the batch counter."""
    case = replace(case, momentum=0.0)
    tensors = given(case, CUDA)
    # a tenth of the batch's deviation: r, and nearly every d, is at its limit
    tensors = replace(tensors, running_var=tensors.running_var / 100)
    graph, found = captured(case, tensors)
    seen = []
    for batch in range(case.batches, 8):  # the last limit is reached with 6
        graph.replay()
        assert found["num_batches_tracked"].item() == batch + 1
        for name, value in fp64.expectations(replace(case, batches=batch), tensors).items():
            assert exact.error_ratio(found[name], value, FP32) <= 1, f"{name} of batch {batch}"
        seen.append(found["y"].clone())
    assert [bit_identical(*pair) for pair in itertools.pairwise(seen)] == [False, False, False, True]


@every_pair
@pytest.mark.parametrize("kind", ["graphs", "eager"])
def test_two_streams_at_once(kind: str, pair: list[Case]) -> None:
    """Graphs have counters of their own, and so have streams: beside one another they do not mix."""
    tensors = [given(case, CUDA) for case in pair]
    expected = [eager(*one, REPEATS) for one in zip(pair, tensors, strict=True)]
    works, buffers = [], []
    for case, own in zip(pair, tensors, strict=True):
        module = one_step.layer(case, bnfast, own)
        work = partial(one_step.step, module, own.x, own.dy)
        works.append(partial(replayed, *recorded(work)) if kind == "graphs" else work)
        buffers.append(one_step.buffers(module))
    streams, results = [torch.cuda.Stream() for _ in pair], [list[Named]() for _ in pair]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # 10 ms, for the host to queue all steps on both streams
    for _ in range(REPEATS):
        for stream, work, into in zip(streams, works, results, strict=True):
            with torch.cuda.stream(stream):
                into.append(work())
    torch.cuda.synchronize()
    for into, own, value in zip(results, buffers, expected, strict=True):
        for repeat, result in enumerate(into):
            assert_same_bits({**result, **own}, value, f"of step {repeat}")


@every_layer
def test_first_call_ever_is_captured(case: Case) -> None:
    """In a process of its own the first step is recorded: kernels are compiled and loaded while it is."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(first_call, case).result(timeout=300) == []


def first_call(case: Case) -> list[str]:
    """The names of results of three replays that are not those of three steps afterwards."""
    tensors = given(case, CUDA)
    graph, found = captured(case, tensors)
    for _ in range(3):
        graph.replay()
    expected = eager(case, tensors, 3)
    return [name for name, value in expected.items() if not bit_identical(found[name], value)]


@every_pair
@pytest.mark.parametrize("streams", ["own", "default"])
def test_two_host_threads_at_once(streams: str, pair: list[Case]) -> None:
    """At the first call too, which both make at the same moment: plans and launches are new to both."""
    tensors = [given(case, CUDA) for case in pair]
    expected = [eager(*one, REPEATS) for one in zip(pair, tensors, strict=True)]
    forget_plans()
    start = threading.Barrier(len(pair))

    def work(case: Case, tensors: Given) -> Named:
        torch.cuda.set_device(0)
        stream = torch.cuda.Stream() if streams == "own" else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            module = one_step.layer(case, bnfast, tensors)
            start.wait()
            for _ in range(REPEATS):
                result = one_step.step(module, tensors.x, tensors.dy)
            stream.synchronize()
            return {**result, **one_step.buffers(module)}

    torch.cuda.synchronize()
    with ThreadPoolExecutor(len(pair)) as pool:
        found = list(pool.map(work, pair, tensors))
    for result, value in zip(found, expected, strict=True):
        assert_same_bits(result, value)


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    for case in (*SPLIT, Case((32, 64, 28, 28), BF16, training=False)):
        oracle.check(case, torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("activation", [None, "relu"])
@every_layer
def test_compile_with_graphs(case: Case, activation: str | None) -> None:
    """torch.compile(mode="reduce-overhead") makes CUDA graphs of a step, which then does what eager does."""
    tensors = given(case, CUDA)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    one, other = (made(case, tensors, activation) for _ in range(2))
    compiled = torch.compile(one, mode="reduce-overhead", fullgraph=True)
    found, expected = [], []
    for module, run, results in ((one, compiled, found), (other, other, expected)):
        for _ in range(4):  # records at the second, replays from the third on
            torch.compiler.cudagraph_mark_step_begin()
            kept = {**one_step.step(run, tensors.x, tensors.dy), **one_step.buffers(module)}
            results.append({name: t.clone() for name, t in kept.items()})  # a replay overwrites them
    for repeat, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(a, b, f"of step {repeat}")
    counted = torch._dynamo.utils.counters["inductor"]
    assert not counted["cudagraph_skips"], "equal, but Inductor ran without a CUDA graph"
    # x and dy are copied into every graph that is recorded
    assert counted["cudagraph_recorded_non_static_inputs"], "equal, but no CUDA graph was recorded"
