"""The copy rate is what fake clocks really do, and of kernels that copy; and what a GPU says of itself."""

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
from tests.support.toy_launches import Executed

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


@pytest.mark.parametrize(("free", "size"), [(FREE, 512 * KB), (16 * 256 * KB + 240, 256 * KB)])
def test_known_rates_are_reported_of_cold_buffers(
    free: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None has been used for four times the L2. Where memory is short, they are smaller, and no more than a
    quarter of it. The best way is the yardstick."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    clock, rates, used = Clock(), {"slow": 1500.0, "fast": 4321.0, "medium": 2000.0}, list[int]()

    def way(rate: float) -> machine.Copy:
        def run(source: Tensor, destination: Tensor) -> None:
            assert source.nbytes == destination.nbytes == size
            used.append(source.data_ptr())
            clock.work(2 * size / rate / 1e3)

        return run

    ways = {name: way(rate) for name, rate in rates.items()}
    lines = list(machine.copies(CPU, clock.stopwatch, ways, rounds=5))
    assert {line.ran: line.GBps for line in lines} == pytest.approx(rates)
    for line in lines:
        assert line.us_low == pytest.approx(line.us) == pytest.approx(line.us_high)
        assert (line.cache, line.floor_bytes, line.rounds) == ("cold", 2 * size, 5)
    assert machine.copy_rate(lines) == pytest.approx(4321)
    last: dict[int, int] = {}
    for number, address in enumerate(used):
        if address in last:
            assert (number - last[address] - 1) * size >= timing.COLD_BYTES
        last[address] = number
    assert len(used) > len(last) == 2
    assert 2 * len(last) * size <= free // 4


def test_too_little_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 256 * KB - 1, FREE))
    lines = list(machine.copies(CPU, Clock().stopwatch))
    assert [(line.status, line.note, line.us) for line in lines] == [("cannot", machine.NO_ROOM, None)]
    with pytest.raises(RuntimeError, match=f"no copy could be measured: {machine.NO_ROOM}"):
        machine.copy_rate(lines)


@pytest.mark.compiled
@pytest.mark.usefixtures("executed")
@pytest.mark.parametrize("values", [512, 3000, 9 * 1024])
def test_the_kernel_copies_once(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Executed(machine.copy_kernel)
    monkeypatch.setattr(machine, "copy_kernel", kernel)
    x, y = torch.randn(values), torch.zeros(values)
    machine.WAYS["copy_kernel"](x, y)
    assert torch.equal(x, y)
    (t,) = (launch.tensors for launch in kernel.launched)
    assert (t["x_ptr"].reads, t["x_ptr"].writes, t["y_ptr"].reads, t["y_ptr"].writes) == (1, 0, 0, 1)
    machine.WAYS["Tensor.copy_"](torch.ones(values), y)
    assert (y == 1).all()


# what a GPU says of itself


@pytest.mark.parametrize(("answer", "code", "found"), [
    (ANSWER, 0, FOUND), ("570.86.15, [Not Supported], [Unknown Error]\n", 0, {"driver": "570.86.15"}),
    ("", 0, {}), ("No devices were found\n", 0, {}), (ANSWER * 2, 0, {}), (ANSWER, 9, {}),
    (FileNotFoundError(), 0, {}), (subprocess.TimeoutExpired("nvidia-smi", 1), 0, {}),
], ids=str)  # fmt: skip
def test_clocks_are_read_and_what_the_gpu_does_not_tell_is_none(
    answer: str | Exception, code: int, found: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does an answer of another form, or one of several GPUs, tell anything."""

    def run(command: Sequence[str], **options: Any) -> Any:
        assert command[0] == "nvidia-smi"
        assert "clocks.sm" in command[1]
        assert options["timeout"] == stamp.PATIENCE
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer, returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    assert stamp.clocks(CPU) == found
