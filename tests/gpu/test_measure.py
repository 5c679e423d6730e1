"""The benchmarks on a GPU: every kind of layer, in both layouts and as the suites measure it; and the
training step of a narrow ResNet-50."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import cases, measure, suites
from benchmarks.records import MEASURED
from benchmarks.resnet import PLAIN, Task
from benchmarks.step import Effort, measure_steps
from benchmarks.suites import Network

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", suites.LAYOUTS)
@pytest.mark.parametrize(
    "network", [suites.RESNET50, suites.SDXL_UNET, suites.NNUNET, suites.UNET3D], ids=lambda n: n.name
)
def test_layers_are_timed(network: Network, layout: str, dtype: torch.dtype) -> None:
    """torch's takes the types that it is given; nothing is quicker than its bytes could ever be, eager or in
    a graph; and bnfast's results are right, or they would not be timed."""
    first = cases.of_network("suite", network, dtype, layout == "channels_last")[0]
    size = (96, 96) if len(first.shape) == 4 else (24, 24, 16)
    channels = 64 if network.norm != "InstanceNorm" else first.shape[1]
    groups = min(first.groups, channels)
    case = dataclasses.replace(first, shape=(16, channels, *size), groups=groups)
    method = measure.Method(rounds=5)
    found = list(measure.of_case(case, measure.get(["bnfast", "torch"]), torch.device("cuda"), method))
    assert {r.status for r in found} == {MEASURED}, [r.note for r in found]
    ways = {(r.variant, r.direction, r.cache, r.mode) for r in found}
    assert len(ways) == 2 * 2 * (2 + 1)  # both libraries, cold and warm, forward, backward, graph of both
    for r in found:
        assert r.us is not None
        assert r.floor_bytes is not None
        assert r.us > r.floor_bytes / 100e12 * 1e6  # at 100 TB/s
        assert r.copied_MB in (0, None) or r.variant == "torch"
    assert {r.ran for r in found if r.variant == "bnfast"} == {"Triton"}
    assert {r.ran for r in found if r.variant == "torch"} <= {"Native", "Cudnn"}


def test_training_steps_are_timed() -> None:
    """Of every variant, eager and as a graph; none is timed whose losses are wrong."""
    task = Task(torch.device("cuda"), width=16, classes=10, image=64)
    lines = list(measure_steps(task, (16,), stages=(PLAIN,), effort=Effort(rounds=3, steps=1)))
    assert [(line.status, line.note) for line in lines] == [(MEASURED, "")] * 2 * len(PLAIN)
    assert {line.ran for line in lines} == {"torch", "bnfast's kernels"}
    x_bytes = 16 * 3 * 64 * 64 * 2  # a step keeps far more than its input; less is a count that missed it
    assert all(line.us and line.peak_MB and line.peak_MB * 1e6 > 10 * x_bytes for line in lines)
