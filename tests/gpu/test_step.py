"""The training step of a narrow ResNet-50 on a GPU: captured, with memory counted, and trained alike."""

from __future__ import annotations

import pytest
import torch

from benchmarks.records import MEASURED
from benchmarks.resnet import PLAIN, Task
from benchmarks.step import Effort, disagreeing, measure_steps

pytestmark = pytest.mark.gpu


def test_every_variant_eager_and_as_a_graph() -> None:
    task = Task(torch.device("cuda"), width=16, classes=10, image=64)
    effort = Effort(rounds=3, steps=1)
    lines = list(measure_steps(task, (16,), stages=(PLAIN,), effort=effort))
    assert [(line.status, line.note) for line in lines] == [(MEASURED, "")] * 2 * len(PLAIN)
    assert disagreeing(lines) == []
    assert {line.ran for line in lines} == {"torch", "bnfast's kernels"}
    x_bytes = 16 * 3 * 64 * 64 * 2  # a step keeps far more than its input; less is a count that missed it
    assert all(line.us and line.peak_MB and line.peak_MB * 1e6 > 10 * x_bytes for line in lines)
