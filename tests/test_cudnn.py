"""cuDNN's graphs as they are written, with a stand-in for NVIDIA's package: which tensors they are given, in
which layouts, and that what they say is a BatchNorm with what surrounds it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cudnn, fairness, measure, timing
from benchmarks.baselines import given
from benchmarks.cudnn import FRONTEND
from benchmarks.records import CANNOT
from codegen.cases import Case
from tests.support import fake_cudnn

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = Case("BatchNorm", (4, 16, 6, 6), 0, torch.float32, False, "relu", True)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = fake_cudnn.module()
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    cudnn._handle.cache_clear()
    yield module
    cudnn._handle.cache_clear()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("scalars", [True, False], ids=["one-zero", "zeros"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_step_is_right(
    dtype: torch.dtype, activation: str | None, residual: bool, scalars: bool, last: bool, fake: Any
) -> None:
    fake.pygraph.scalars = scalars
    case = dataclasses.replace(
        CASE, dtype=dtype, activation=activation, residual=residual, channels_last=last
    )
    contender = FRONTEND.build(case, CPU)
    zeros = ", reads zeros of x's size" if activation and not scalars else ""
    assert contender.ran == f"cuDNN 92000, a graph each way{zeros}"
    found = fairness.step(contender, case, CPU)
    assert fairness.checked(found, case, CPU) is None
    assert fairness.strayed(found, case) == ""


def test_three_dimensions() -> None:
    case = dataclasses.replace(CASE, shape=(2, 16, 3, 4, 5), channels_last=True)
    assert fairness.checked(fairness.step(FRONTEND.build(case, CPU), case, CPU), case, CPU) is None


def test_running_statistics_move(monkeypatch: pytest.MonkeyPatch) -> None:
    used = given(CASE, CPU)
    monkeypatch.setattr(cudnn, "given", lambda case, device: used)
    x, before = CASE.tensor(CPU, 0), used.running_mean.clone()
    FRONTEND.build(CASE, CPU).forward(x, torch.zeros_like(x))
    torch.testing.assert_close(used.running_mean, 0.9 * before + 0.1 * x.mean((0, 2, 3)))


def test_a_machine_without_an_engine_is_told_in_the_table(fake: Any) -> None:
    def none(self: Any) -> None:
        raise RuntimeError("No valid engine configs for Norm_Fwd_\n{...}")

    fake.pygraph.check_support = none
    anywhere = dataclasses.replace(FRONTEND, unable=lambda case, device: None)
    method = measure.Method(rounds=5, stopwatch=timing.on_host)
    (record,) = measure.of_case(CASE, [anywhere], CPU, method)
    assert record.status == CANNOT
    assert record.note == "RuntimeError: No valid engine configs for Norm_Fwd_ {...}"


@pytest.mark.parametrize(("change", "why"), [
    ({"norm": "GroupNorm", "groups": 4}, "its graphs here are BatchNorm's, not GroupNorm's"),
    ({"activation": "silu"}, "its graphs here have no silu"),
    ({"dtype": torch.float64}, "it has no fp64"),
    ({}, None),
])  # fmt: skip
def test_what_it_takes(change: dict[str, Any], why: str | None) -> None:
    assert FRONTEND.unable(dataclasses.replace(CASE, **change), CUDA) == why


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert FRONTEND.unable(CASE, CUDA) == "cudnn cannot be imported here: ModuleNotFoundError"
    assert FRONTEND.unable(CASE, CPU) == "needs a GPU with cuDNN"
