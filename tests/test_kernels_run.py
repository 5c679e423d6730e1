"""What is told of a layer besides its time: the kernels that it ran, the host's time, memory."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import baselines, compare, cost_tables, kernels_run, predict, report
from benchmarks.baselines import pytorch
from benchmarks.baselines.contender import Baseline, Contender
from benchmarks.records import CANNOT, MEASURED, Record
from benchmarks.stopwatch import Timed, Work
from codegen.cases import Case

CPU = torch.device("cpu")
CASE = Case("suite", "network", "BatchNorm", (4, 8, 6, 6), 0, torch.float32, True, "relu", True)


def event(name: str, start: float, device: DeviceType = DeviceType.CUDA, marked: bool = False) -> object:
    when = SimpleNamespace(start=start)
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=marked, time_range=when)


def test_only_what_ran_on_the_gpu_in_its_order() -> None:
    events = [
        event("second", 7.0), event("Memset (Device)", 9.0), event("aten::add", 1.0, DeviceType.CPU),
        event("a mark", 2.0, marked=True), event("first", 3.0),
    ]  # fmt: skip
    assert kernels_run.on_gpu(events) == ["first", "second", "Memset (Device)"]


def test_the_second_run_is_looked_at_with_all_that_comes_before_and_after() -> None:
    did: list[str] = []
    timed = Timed(lambda: did.append("work"), 1, lambda: did.append("prepare"), lambda: did.append("clean"))

    def watch(work: Work) -> list[str]:
        did.append("watched")
        work()
        return ["a kernel"]

    assert kernels_run.kernels(timed, watch) == ["a kernel"]
    assert did == ["prepare", "work", "clean", "prepare", "watched", "work", "clean"]


def operators(work: Work) -> list[str]:
    """Stands in for a GPU's kernels: what torch's dispatcher is asked for on a CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen:
        work()
    return [e.name for e in seen.events() if e.name in ("aten::native_batch_norm", "aten::add", "aten::relu")]


@pytest.fixture
def found(plain_torch: None) -> list[Record]:
    who = baselines.get(["torch", "cudnn-op"])
    return list(kernels_run.of_case(CASE, who, CPU, operators))


def test_kernels_of_those_that_can_run_a_case(found: list[Record]) -> None:
    forward, backward = found
    assert (forward.status, forward.kind, forward.variant) == (MEASURED, "kernels", "torch")
    assert (forward.direction, forward.launches) == ("forward", 3)
    assert forward.ran == "aten::native_batch_norm; aten::add; aten::relu"
    assert (backward.status, backward.note) == (CANNOT, "torch's profiler saw nothing on the GPU")


def test_one_that_fails_is_named(plain_torch: None) -> None:
    def fail(x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    broken = Baseline("broken", "", pytorch.anything, lambda case, device: Contender("", fail, []))
    found = list(kernels_run.of_case(CASE, [broken], CPU, operators))
    assert {(r.status, r.note) for r in found} == {(CANNOT, "RuntimeError: no such kernel")}


def test_counted_beside_predicted(found: list[Record]) -> None:
    told = [*predict.records([CASE], compiled=False), *found]
    headers, rows = cost_tables.kernels(told)
    assert headers == ("C x size", "predicted", "torch")
    assert rows == [["8 x 6x6 + z relu", "2+2", "3+-"]]
    assert cost_tables.names(told) == ["torch: aten::native_batch_norm (1), aten::add (1), aten::relu (1)"]


def test_a_kernel_more_is_a_change(found: list[Record]) -> None:
    more = [dataclasses.replace(r, launches=4) for r in found]
    (change,) = compare.changes(found, more)
    assert (change.before, change.after, change.sure) == (3, 4, True)
    assert change.what == "torch network 8 x 6x6 + z relu fp32 channels_last forward, launches"


@pytest.mark.parametrize(("name", "shown"), [
    ("_forward_sums", "_forward_sums"), ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
    ("void at::native::reduce_kernel<512, 1, at::ReduceOp<float> >(at::Op)", "at::native::reduce_kernel"),
    ("<unnamed>::fill(int)", "<unnamed>::fill(int)"), ("x" * 90, "x" * 60),
])  # fmt: skip
def test_names_without_what_nobody_reads(name: str, shown: str) -> None:
    assert cost_tables.short(name) == shown


def test_host_time_and_memory_of_each() -> None:
    def line(variant: str, direction: str, mode: str, host: float, peak: float | None) -> Record:
        return Record(
            "layer", MEASURED, variant, shape="4x8x6x6", direction=direction, mode=mode, cache="cold",
            host_us=host, peak_MB=peak,
        )  # fmt: skip

    table = cost_tables.besides(
        [
            line("torch", "forward", "eager", 9.0, 5.0), line("bnfast", "forward", "eager", 10.0, 7.0),
            line("bnfast", "forward", "eager", 30.0, 8.0), line("bnfast", "backward", "eager", 50.0, 1.0),
            line("bnfast", "both", "graph", 3.25, None),
        ]
    )  # fmt: skip
    assert table[1] == [["bnfast", "20.0", "50.0", "3.2", "8", "1"], ["torch", "9.0", "-", "-", "5", "-"]]
    assert max(map(len, report.table(*table).splitlines())) <= report.WIDTH
