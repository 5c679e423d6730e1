"""The probes of the GPU itself report what fake clocks really do, and run with their kernels; and what a
GPU says of itself."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
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
ANSWER = "NVIDIA H200, 570.86.15, 1980, 35\n"


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 256 * KB)


def wall(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def copies_at(clock: Clock, rates: dict[str, float], **options: Any) -> list[machine.Record]:
    """By ways that take as long as these rates (GB/s) say."""

    def way(rate: float) -> machine.Copy:
        return lambda source, to: clock.work(2 * source.nbytes / rate / 1e3)

    ways = {name: way(rate) for name, rate in rates.items()}
    given = {"sizes": (64 * KB, 32 * KB), "rounds": 5, "memory": FREE, **options}
    return list(machine.copies(CPU, clock.stopwatch, ways=ways, **given))


# the copy rate


def test_known_rates_are_reported_and_the_best_one_is_the_yardstick() -> None:
    rates = {"slow": 1500.0, "fast": 4321.0}
    lines = copies_at(Clock(), rates)
    assert [line.GBps for line in lines] == pytest.approx([rates[line.ran] for line in lines])
    assert all(line.us_low == pytest.approx(line.us) == pytest.approx(line.us_high) for line in lines)
    found = [(line.ran, line.shape, line.cache, line.floor_bytes, line.rounds) for line in lines]
    assert found == [(name, "0 MiB", "cold", 2 * size, 5) for size in (64 * KB, 32 * KB) for name in rates]
    assert machine.copy_rate(lines) == pytest.approx(4321)


def test_cold_buffers_have_not_been_used_for_four_times_the_l2() -> None:
    used: list[tuple[int, int]] = []

    def run(source: Tensor, destination: Tensor) -> None:
        assert source.numel() == destination.numel()
        used.append((source.data_ptr(), source.nbytes))

    ways = dict.fromkeys(("one", "two", "three"), run)
    for size in (32 * KB, 512 * KB):
        used.clear()
        list(machine.copies(CPU, wall, sizes=[size], ways=ways, rounds=5, memory=FREE))
        last: dict[int, int] = {}
        for number, (address, _) in enumerate(used):
            if address in last:
                between = used[last[address] + 1 : number]
                assert sum(nbytes for _, nbytes in between) >= timing.COLD_BYTES
            last[address] = number
        assert len(used) > len(last) == timing.rotation(size)


def test_sizes_that_do_not_fit_are_named() -> None:
    enough = 4 * 2 * 256 * KB * timing.rotation(256 * KB)
    sizes = {"sizes": (512 * KB, 256 * KB)}
    lines = copies_at(Clock(), {"copy": 10.0}, memory=enough, **sizes)
    assert [(line.status, line.note) for line in lines] == [("cannot", machine.NO_ROOM), ("measured", "")]
    assert lines[0].us is None
    lines = copies_at(Clock(), {"copy": 10.0}, memory=enough - 1, **sizes)
    assert [line.status for line in lines] == ["cannot", "cannot"]
    with pytest.raises(RuntimeError, match=f"no copy could be measured: {machine.NO_ROOM}"):
        machine.copy_rate(lines)


def test_the_real_ways_copy() -> None:
    lines = list(machine.copies(CPU, wall, sizes=[4 * KB], rounds=2, memory=FREE))
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


def answering(monkeypatch: pytest.MonkeyPatch, text: str) -> list[Sequence[str]]:
    """nvidia-smi says this. Returns the questions."""
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str], **options: Any) -> Any:
        asked.append(command)
        assert options["timeout"] == stamp.PATIENCE
        return SimpleNamespace(stdout=text, returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_clocks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, ANSWER)
    assert stamp.clocks(CPU) == stamp.Clocks("NVIDIA H200", "570.86.15", 1980.0, 35.0)
    assert asked[0][0] == "nvidia-smi"
    assert "clocks.sm" in asked[0][1]


def test_what_the_gpu_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "[N/A], 570.86.15, [Not Supported], [Unknown Error]\n")
    assert stamp.clocks(CPU) == stamp.Clocks(driver="570.86.15")


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 1), None])
def test_no_answer_is_no_error(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: object, **options: object) -> Any:
        if error is not None:
            raise error
        return SimpleNamespace(stdout="", returncode=9)

    monkeypatch.setattr(subprocess, "run", run)
    assert stamp.clocks(CPU) == stamp.Clocks()


@pytest.mark.parametrize("text", ["", "No devices were found\n", ANSWER * 2])
def test_an_answer_of_another_form_tells_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, text)
    assert stamp.clocks(CPU) == stamp.Clocks()
