"""What is told of a layer besides its time: the kernels that it ran, the host's time, memory."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import baselines, kernels_run, measure, predict, report, tables
from benchmarks.baselines import Baseline, Contender
from benchmarks.records import CANNOT, MEASURED, Record, frame
from benchmarks.timing import Timed, Work
from codegen.cases import Case

CPU = torch.device("cpu")
CASE = Case("BatchNorm", (4, 8, 6, 6), 0, torch.float32, True, "relu", True, network="network")


def event(name: str, start: float, device: DeviceType = DeviceType.CUDA, marked: bool = False) -> object:
    when = SimpleNamespace(start=start)
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=marked, time_range=when)


def test_only_what_ran_on_the_gpu_in_its_order() -> None:
    events = [
        event("second", 7.0), event("Memset (Device)", 9.0), event("aten::add", 1.0, DeviceType.CPU),
        event("a mark", 2.0, marked=True), event("first", 3.0),
    ]  # fmt: skip
    assert kernels_run.on_gpu(events) == ["first", "second", "Memset (Device)"]


def test_the_second_run_is_looked_at_with_all_that_comes_before_and_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []
    timed = Timed(lambda: did.append("work"), 1, lambda: did.append("prepare"), lambda: did.append("clean"))

    def watch(work: Work) -> list[str]:
        did.append("watched")
        work()
        return ["a kernel"]

    monkeypatch.setattr(kernels_run, "profiled", watch)
    assert kernels_run.kernels(timed) == ["a kernel"]
    assert did == ["prepare", "work", "clean", "prepare", "watched", "work", "clean"]


def operators(work: Work) -> list[str]:
    """Stands in for a GPU's kernels: what torch's dispatcher is asked for on a CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen:
        work()
    return [e.name for e in seen.events() if e.name in ("aten::native_batch_norm", "aten::add", "aten::relu")]


@pytest.fixture
def seen(plain_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_run, "profiled", operators)


@pytest.fixture
def found(seen: None) -> list[Record]:
    return list(kernels_run.of_case(CASE, measure.get(["torch", "cudnn-op"]), CPU))


def test_kernels_of_those_that_can_run_a_case(found: list[Record]) -> None:
    forward, backward = found
    assert (forward.status, forward.kind, forward.variant) == (MEASURED, "kernels", "torch")
    assert (forward.direction, forward.launches) == ("forward", 3)
    assert forward.ran == "aten::native_batch_norm; aten::add; aten::relu"
    assert (backward.status, backward.note) == (CANNOT, "torch's profiler saw nothing on the GPU")


def test_one_that_fails_is_named(seen: None) -> None:
    def fail(x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    broken = Baseline("broken", "", baselines.anything, lambda case, device: Contender("", fail, []))
    found = list(kernels_run.of_case(CASE, [broken], CPU))
    assert {(r.status, r.note) for r in found} == {(CANNOT, "RuntimeError: no such kernel")}


def test_counted_beside_predicted(found: list[Record]) -> None:
    told = frame([*predict.records([CASE], compiled=False), *found])
    table = tables.kernels(told)
    assert list(table) == ["C x size", "predicted", "torch"]
    assert table.to_numpy().tolist() == [["8 x 6x6 + z relu", "2+2", "3+-"]]
    assert tables.kernel_names(told) == ["torch: aten::native_batch_norm (1), aten::add (1), aten::relu (1)"]


def test_a_kernel_more_is_a_change(found: list[Record]) -> None:
    more = [dataclasses.replace(r, launches=4) for r in found]
    (change,) = report.changes(frame(found), frame(more)).to_dict("records")
    assert (change["before"], change["after"], change["sure"]) == (3, 4, True)
    assert change["what"] == "torch network 8 x 6x6 + z relu fp32 channels_last forward, launches"


@pytest.mark.parametrize(("name", "shown"), [
    ("_forward_sums", "_forward_sums"), ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
    ("void at::native::reduce_kernel<512, 1, at::ReduceOp<float> >(at::Op)", "at::native::reduce_kernel"),
    ("<unnamed>::fill(int)", "<unnamed>::fill(int)"), ("x" * 90, "x" * 60),
])  # fmt: skip
def test_names_without_what_nobody_reads(name: str, shown: str) -> None:
    assert tables.short(name) == shown
