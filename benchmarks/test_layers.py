"""`pytest benchmarks`: some layers with every provider, timed by pytest-benchmark.

What it reads is the host's clock around a call that is waited for: what somebody at a prompt sees. On a GPU,
`python3 -m benchmarks run` reads the GPU's own clock, with L2 cold and warm. Without a GPU the shapes are
small and bnfast runs plain torch: that shows what layers cost on a CPU, and that the providers work."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import measure, timing
from codegen.cases import DIRECTIONS, Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, SIDE = (64, 4) if DEVICE.type == "cuda" else (2, 1)
COMPILED = ("compile", "compile-max")  # seconds each: only if asked for
CASES = [
    Case(norm, (BATCH, c, side * SIDE, side * SIDE), groups, torch.bfloat16, last, activation, residual)
    for norm, c, side, groups, activation, residual, last in (
        ("BatchNorm", 64, 14, 0, "relu", False, True),
        ("BatchNorm", 256, 14, 0, "relu", True, True),
        ("BatchNorm", 256, 14, 0, None, False, False),
        ("GroupNorm", 320, 16, 32, "silu", False, False),
        ("InstanceNorm", 64, 16, 64, "leaky_relu", False, False),
    )
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("variant", measure.BASELINES)
def test_layer(benchmark: Any, variant: str, case: Case, direction: str) -> None:
    if variant in COMPILED and not os.environ.get("BNFAST_BENCHMARK_COMPILED"):
        pytest.skip("set BNFAST_BENCHMARK_COMPILED=1 for what torch.compile makes")
    ((record, provider),) = measure.ready(case, measure.get([variant]), DEVICE)
    if provider is None:
        assert measure.WRONG not in record.note
        pytest.skip(record.note)
    calls = measure.Calls(record, provider, [measure.inputs(case, DEVICE)])
    timed = calls.timed(direction, "eager", timing.nothing)
    benchmark.group = f"{case}, {direction}"

    def waited(*works: timing.Work) -> None:
        for each in works:
            each()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(
        partial(waited, timed.work),
        setup=partial(waited, timed.clean, timed.prepare),
        rounds=20,
        warmup_rounds=3,
    )
