"""The probes of the GPU itself report what fake clocks really do, and run with their kernels; and what a
GPU says of itself."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine, stamp, timing
from tests.support.clock import Clock
from tests.support.trace import trace

CPU = torch.device("cpu")
KB, FREE = 1024, 1 << 30
ANSWER = "570.86.15, 1980, 35\n"
FOUND = {"driver": "570.86.15", "clock_MHz": 1980.0, "temperature_C": 35.0}


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of 64 KB, and 1 GB of free memory."""
    monkeypatch.setattr(timing, "COLD_BYTES", 256 * KB)
    monkeypatch.setattr(machine, "SIZE", 512 * KB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, 2 * FREE))


# the copy rate


def test_known_rates_are_reported_and_the_best_one_is_the_yardstick() -> None:
    clock, rates = Clock(), {"slow": 1500.0, "fast": 4321.0}

    def way(rate: float) -> machine.Copy:
        return lambda source, to: clock.work(2 * source.nbytes / rate / 1e3)

    ways = {name: way(rate) for name, rate in rates.items()}
    lines = list(machine.copies(CPU, clock.stopwatch, ways, rounds=5))
    assert {line.ran: line.GBps for line in lines} == pytest.approx(rates)
    assert all(line.us_low == pytest.approx(line.us) == pytest.approx(line.us_high) for line in lines)
    for line in lines:
        assert (line.cache, line.floor_bytes, line.rounds) == ("cold", 2 * 512 * KB, 5)
    assert machine.copy_rate(lines) == pytest.approx(4321)


@pytest.mark.parametrize(("free", "size"), [(FREE, 512 * KB), (16 * 256 * KB + 240, 256 * KB)])
def test_cold_buffers_have_not_been_used_for_four_times_the_l2(
    free: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short, they are smaller, and no more than a quarter of it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    used: list[tuple[int, int]] = []

    def run(source: Tensor, destination: Tensor) -> None:
        assert source.nbytes == destination.nbytes == size
        used.append((source.data_ptr(), source.nbytes))

    list(machine.copies(CPU, timing.on_host, dict.fromkeys(("one", "two", "three"), run), rounds=5))
    last: dict[int, int] = {}
    for number, (address, _) in enumerate(used):
        if address in last:
            assert sum(nbytes for _, nbytes in used[last[address] + 1 : number]) >= timing.COLD_BYTES
        last[address] = number
    assert len(used) > len(last) == 2
    assert 2 * len(last) * size <= free // 4


def test_too_little_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 256 * KB - 1, FREE))
    lines = list(machine.copies(CPU, Clock().stopwatch))
    assert [(line.status, line.note, line.us) for line in lines] == [("cannot", machine.NO_ROOM, None)]
    with pytest.raises(RuntimeError, match=f"no copy could be measured: {machine.NO_ROOM}"):
        machine.copy_rate(lines)


def test_the_real_ways_copy() -> None:
    lines = list(machine.copies(CPU, timing.on_host, rounds=1))
    assert [line.ran for line in lines] == ["Tensor.copy_", "copy_kernel"]
    assert all(line.us and line.GBps for line in lines)


@pytest.mark.parametrize("values", [512, 3000, 9 * 1024])
def test_the_kernel_copies_once(values: int) -> None:
    x, y = torch.randn(values), torch.zeros(values)
    with trace(x=x, y=y) as t:
        machine.copy(x, y)
    assert torch.equal(x, y)
    assert (t["x"].reads, t["x"].writes, t["y"].reads, t["y"].writes) == (1, 0, 0, 1)
    assert not t.out_of_bounds
    assert not t.hazards


# launches


def test_known_launch_gaps_and_host_times_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, host = Clock(), Clock()

    def launched(x: Tensor, programs: int) -> None:
        gpu.work(2.0 + programs)
        host.work(11.0)

    def in_graph(work: timing.Work) -> timing.Work:
        took = gpu.stopwatch(work)
        return lambda: gpu.work(took / 4)

    def stopwatch(work: timing.Work) -> float:
        return gpu.stopwatch(work) + 50  # events cost something, too

    four = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: four)
    monkeypatch.setattr(machine, "in_graph", in_graph)
    lines = list(machine.launches(CPU, stopwatch, host.stopwatch, launched, rounds=5))
    assert [(line.variant, line.shape, line.mode, line.us, line.host_us) for line in lines] == [
        ("launch gap", "grid of 1", "eager", 3.0, None), ("launch gap", "grid of 1", "graph", 0.75, None),
        ("launch gap", "grid of 4", "eager", 6.0, None), ("launch gap", "grid of 4", "graph", 1.5, None),
        ("launch, host", "grid of 1", "eager", None, 11.0),
    ]  # fmt: skip


# what a GPU says of itself


def test_clocks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str], **options: Any) -> Any:
        asked.append(command)
        assert options["timeout"] == stamp.PATIENCE
        return SimpleNamespace(stdout=ANSWER, returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert stamp.clocks(CPU) == FOUND
    assert asked[0][0] == "nvidia-smi"
    assert "clocks.sm" in asked[0][1]


@pytest.mark.parametrize(("answer", "code", "found"), [
    ("570.86.15, [Not Supported], [Unknown Error]\n", 0, {"driver": "570.86.15"}), ("", 0, {}),
    ("No devices were found\n", 0, {}), (ANSWER * 2, 0, {}), (ANSWER, 9, {}), (FileNotFoundError(), 0, {}),
    (subprocess.TimeoutExpired("nvidia-smi", 1), 0, {}),
], ids=str)  # fmt: skip
def test_what_the_gpu_does_not_tell_is_none_and_no_error(
    answer: str | Exception, code: int, found: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does an answer of another form, or one of several GPUs, tell anything."""

    def run(*command: object, **options: object) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer, returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    assert stamp.clocks(CPU) == found
