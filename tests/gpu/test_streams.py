"""CUDA graphs, streams and host threads. Two launches that overlap must never meet in the same counters."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import bnfast
from bnfast.checks import one_step
from bnfast.checks.cases import Case, Given, batch_renorm, group_norm, instance_norm
from bnfast.kernels.launch_plan import forget_plans
from tests.gpu import parity
from tests.support.buffers import bit_identical
from tests.support.families import layouts

pytestmark = pytest.mark.gpu

REPEATS = 25

# Many programs a channel or group, so that what they share is in use for long.
# Two of a kind, with other data.
PAIRS = [
    [Case((32, 64, 28, 28), torch.bfloat16, seed=seed) for seed in (0, 1)],
    [group_norm((8, 320, 28, 28), torch.bfloat16, True, groups=32, seed=seed) for seed in (0, 1)],
]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str(pair[0]))
SPLIT = [
    PAIRS[0][0],
    Case((32, 64, 28, 28), torch.float32, channels_last=True),
    Case((64, 65, 7, 7), torch.float16, momentum=None),
    *layouts(
        batch_renorm((32, 64, 28, 28), torch.bfloat16),
        group_norm((16, 64, 28, 28), torch.float32, groups=8),  # held, where it is contiguous
        group_norm((2, 64, 256, 256), torch.bfloat16, groups=8),
        instance_norm((2, 32, 24, 24, 24), torch.float32, tracked=True),
    ),
]


def eager(case: Case, tensors: Given, steps: int) -> dict[str, Tensor]:
    """What `steps` steps on the default stream return and leave in the buffers."""
    module = one_step.layer(case, bnfast, tensors)
    for _ in range(steps):
        result = one_step.step(module, tensors.x, tensors.dy)
    torch.cuda.synchronize()
    return {**result, **one_step.buffers(module)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], where: str = "") -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert bit_identical(found[name], value), f"{name} {where}"


def captured(case: Case, tensors: Given) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """(graph of a step, what it writes to). Other layers have run the same kernels before."""
    module = one_step.layer(case, bnfast, tensors)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = one_step.step(module, tensors.x, tensors.dy)
    return graph, {**result, **one_step.buffers(module)}


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_replays_equal_eager_steps(case: Case) -> None:
    """Output, gradients, running statistics and the batch counter, bit for bit."""
    tensors = parity.given(case)
    expected = eager(case, tensors, REPEATS)
    graph, found = captured(case, tensors)
    for _ in range(REPEATS):
        graph.replay()
    torch.cuda.synchronize()
    assert_same(found, expected)


@every_pair
def test_two_graphs_on_two_streams(pair: list[Case]) -> None:
    """Each graph has counters of its own: replayed beside one another they do not mix."""
    tensors = [parity.given(case) for case in pair]
    expected = [eager(case, given, REPEATS) for case, given in zip(pair, tensors, strict=True)]
    graphs = [captured(case, given) for case, given in zip(pair, tensors, strict=True)]
    streams = [torch.cuda.Stream() for _ in pair]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # 10 ms, for the host to queue all replays on both streams
    for _ in range(REPEATS):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, found), value in zip(graphs, expected, strict=True):
        assert_same(found, value)


FIRST_CALL = """
import torch, bnfast

# a deviation of 10, so that Batch Renormalization's r is at its limit, which is another in each step
x = torch.randn(32, 64, 28, 28, device="cuda") * 10 + 5
x = x.contiguous(memory_format=torch.FORMAT).requires_grad_()
dy = torch.randn_like(x)
layers = [bnfast.LAYER.to("cuda") for _ in range(2)]

def step(layer):
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy), *layer.buffers()]

torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):  # nothing of bnfast has run before
    found = step(layers[0])
for _ in range(3):
    graph.replay()
for _ in range(3):
    expected = step(layers[1])
torch.cuda.synchronize()
assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
print("same")
"""


@pytest.mark.parametrize(
    ("layer", "memory_format"),
    [
        ("BatchNorm2d(64)", "contiguous_format"),
        ("BatchNorm2d(64, momentum=None)", "contiguous_format"),
        ("BatchRenorm2d(64, warmup_steps=0, r_max_steps=9, d_max_steps=9)", "contiguous_format"),
        ("GroupNorm(8, 64)", "contiguous_format"),
        ("GroupNorm(8, 64)", "channels_last"),
        ("InstanceNorm2d(64, affine=True, track_running_stats=True)", "contiguous_format"),
    ],
)
def test_first_call_ever_is_captured(layer: str, memory_format: str) -> None:
    """In a process of its own the first step is recorded: kernels are compiled and loaded while it is."""
    script = textwrap.dedent(FIRST_CALL).replace("LAYER", layer).replace("FORMAT", memory_format)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same"]


@every_pair
def test_two_streams_at_once(pair: list[Case]) -> None:
    tensors = [parity.given(case) for case in pair]
    expected = [eager(case, given, REPEATS) for case, given in zip(pair, tensors, strict=True)]
    modules = [one_step.layer(case, bnfast, given) for case, given in zip(pair, tensors, strict=True)]
    streams = [torch.cuda.Stream() for _ in pair]
    results: list[list[dict[str, Tensor]]] = [[], []]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
    for _ in range(REPEATS):
        for stream, module, given, into in zip(streams, modules, tensors, results, strict=True):
            with torch.cuda.stream(stream):
                into.append(one_step.step(module, given.x, given.dy))
    torch.cuda.synchronize()
    for module, into, value in zip(modules, results, expected, strict=True):
        for repeat, result in enumerate(into):
            assert_same({**result, **one_step.buffers(module)}, value, f"of step {repeat}")


@every_pair
@pytest.mark.parametrize("streams", ["own", "default"])
def test_two_host_threads_at_once(streams: str, pair: list[Case]) -> None:
    """At the first call too, which both make at the same moment: plans and launches are new to both."""
    tensors = [parity.given(case) for case in pair]
    expected = [eager(case, given, REPEATS) for case, given in zip(pair, tensors, strict=True)]
    forget_plans()
    start = threading.Barrier(len(pair))

    def work(case: Case, given: Given) -> dict[str, Tensor]:
        torch.cuda.set_device(parity.device())
        stream = torch.cuda.Stream() if streams == "own" else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            module = one_step.layer(case, bnfast, given)
            start.wait()
            for _ in range(REPEATS):
                result = one_step.step(module, given.x, given.dy)
            stream.synchronize()
            return {**result, **one_step.buffers(module)}

    torch.cuda.synchronize()
    with ThreadPoolExecutor(len(pair)) as pool:
        found = list(pool.map(work, pair, tensors))
    for result, value in zip(found, expected, strict=True):
        assert_same(result, value)


def test_a_device_that_is_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setattr(parity, "device", lambda: torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    for case in (*SPLIT, Case((32, 64, 28, 28), torch.bfloat16, training=False)):
        parity.check(case)
    assert torch.cuda.current_device() == 0


def steps(module: nn.Module, run: Callable[[Tensor], Tensor], given: Given) -> list[dict[str, Tensor]]:
    results = []
    for _ in range(4):  # records at the second, replays from the third on
        torch.compiler.cudagraph_mark_step_begin()
        x = given.x.detach().requires_grad_()
        y = run(x)
        gradients = torch.autograd.grad(y, [x, module.weight, module.bias], given.dy)
        names = ("y", "dx", "dweight", "dbias")
        kept = dict(zip(names, (y.detach(), *gradients), strict=True)) | one_step.buffers(module)
        results.append({name: t.clone() for name, t in kept.items()})  # a replay overwrites them
    return results


@pytest.mark.parametrize(
    "case",
    [
        Case((32, 64, 28, 28), torch.float32),
        Case((32, 64, 28, 28), torch.float32, momentum=None),
        batch_renorm((32, 64, 28, 28), torch.float32),
        *layouts(group_norm((16, 64, 28, 28), torch.float32, groups=8)),
        instance_norm((16, 64, 28, 28), torch.float32),
    ],
    ids=str,
)
def test_compile_with_graphs(case: Case) -> None:
    """torch.compile(mode="reduce-overhead") makes CUDA graphs of a step, which then does what eager does."""
    tensors = parity.given(case)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    one, other = (one_step.layer(case, bnfast, tensors) for _ in range(2))
    compiled = torch.compile(one, mode="reduce-overhead", fullgraph=True)
    found = steps(one, compiled, tensors)
    expected = steps(other, other, tensors)
    for repeat, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_same(a, b, f"of step {repeat}")
    counted = torch._dynamo.utils.counters["inductor"]
    assert not counted["cudagraph_skips"], "equal, but Inductor ran without a CUDA graph"
    # x and dy are copied into every graph that is recorded
    assert counted["cudagraph_recorded_non_static_inputs"], "equal, but no CUDA graph was recorded"
