"""The probes of the GPU itself report what fake clocks and memories really do, and run with their kernels."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import records
from benchmarks.machine import bandwidth, kernels, l2, launch
from benchmarks.machine.facts import Facts, facts
from benchmarks.machine.lines import NO_ROOM, OUT_OF_TIME, size_text
from benchmarks.stopwatch import rotation
from tests.support.clock import Clock

CPU = torch.device("cpu")
HERE = Facts(l2_bytes=1 << 16, free_bytes=1 << 30, processors=4)
KB = 1024


def wall(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


# bandwidth


def way(clock: Clock, kind: str, name: str, moves: int, GBps: float) -> bandwidth.Way:
    def run(source: Tensor, destination: Tensor, processors: int) -> None:
        clock.work(moves * source.nbytes / GBps / 1e3)

    return bandwidth.Way(kind, name, name, moves, run)


def test_known_rates_are_reported() -> None:
    clock = Clock()
    rates = {"copy": 4000.0, "read": 3000.0, "write": 123.0}
    ways = [way(clock, name, name, 1 + (name == "copy"), rate) for name, rate in rates.items()]
    sizes = (256 * KB, 64 * KB, 16 * KB)
    lines = list(bandwidth.bandwidth(CPU, 60, clock.stopwatch, sizes=sizes, ways=ways, rounds=5, found=HERE))
    assert all(line.GBps == pytest.approx(rates[line.variant]) for line in lines)
    assert all(line.us_low == pytest.approx(line.us) == pytest.approx(line.us_high) for line in lines)
    assert {line.rounds for line in lines} == {5}
    found = [(line.variant, line.shape, line.cache, line.floor_bytes) for line in lines]
    assert found == [
        (name, size_text(size), cache, size * (1 + (name == "copy")))
        for size, cache in zip((*sizes, 16 * KB), ("cold", "cold", "cold", "warm"), strict=True)
        for name in rates
    ]


def test_cold_buffers_have_not_been_used_for_four_times_the_l2() -> None:
    used: list[tuple[int, int]] = []

    def run(source: Tensor, destination: Tensor, processors: int) -> None:
        assert source.numel() == destination.numel()
        used.append((source.data_ptr(), source.nbytes))

    ways = [bandwidth.Way("copy", name, name, 2, run) for name in ("one", "two", "three")]
    for size in (32 * KB, 512 * KB):  # too large for warm lines
        used.clear()
        list(bandwidth.bandwidth(CPU, 60, wall, sizes=[size], ways=ways, rounds=5, found=HERE))
        last: dict[int, int] = {}
        for number, (address, _) in enumerate(used):
            if address in last:
                between = used[last[address] + 1 : number]
                assert sum(nbytes for _, nbytes in between) >= 4 * HERE.l2_bytes
            last[address] = number
        assert len(used) > len(last) == rotation(size, 4 * HERE.l2_bytes)


def test_all_buffers_have_their_turn() -> None:
    pairs = [(torch.tensor(float(i)), torch.tensor(0.0)) for i in range(bandwidth.MOST_CALLS + 30)]
    ring, order = bandwidth.Ring(pairs), []
    for _ in range(4):
        ring.turn()
        order += [int(source) for source, _ in ring.taken]
    assert order == [i % len(pairs) for i in range(4 * bandwidth.MOST_CALLS)]


def test_few_large_buffers_go_round_more_than_once() -> None:
    ring = bandwidth.Ring([(torch.zeros(1), torch.zeros(1))] * 2)
    ring.turn()
    assert len(ring.taken) == ring.calls == bandwidth.FEWEST_CALLS


def test_sizes_that_do_not_fit_are_named() -> None:
    clock = Clock()
    small = dataclasses.replace(HERE, free_bytes=4 * 2 * 256 * KB * rotation(256 * KB, 4 * HERE.l2_bytes))
    options = {"sizes": (512 * KB, 256 * KB), "ways": [way(clock, "copy", "copy", 2, 10)], "rounds": 5}
    lines = list(bandwidth.bandwidth(CPU, 60, clock.stopwatch, found=small, **options))
    assert [(line.status, line.note) for line in lines] == [("cannot", NO_ROOM), ("measured", "")]
    assert lines[0].us is None
    less = dataclasses.replace(small, free_bytes=small.free_bytes - 1)
    lines = list(bandwidth.bandwidth(CPU, 60, clock.stopwatch, found=less, **options))
    assert [line.status for line in lines] == ["cannot", "cannot"]


def out_of_time(lines: Sequence[records.Record]) -> bool:
    return bool(lines) and all((line.status, line.note) == ("cannot", OUT_OF_TIME) for line in lines)


def test_what_there_was_no_time_for_is_named() -> None:
    assert out_of_time(list(bandwidth.bandwidth(CPU, 1e-9, sizes=[64 * KB], found=HERE)))
    assert out_of_time(list(l2.l2_reuse(CPU, 1e-9, found=HERE)))
    assert out_of_time(list(launch.launches(CPU, 1e-9, found=HERE)))
    assert out_of_time(list(launch.grid_barriers(CPU, 1e-9, found=HERE)))


def test_the_copy_rate_is_measured_however_long_the_device_took_to_wake_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first buffers outlast its time."""
    clock, randoms = Clock(), bandwidth.kernels.randoms

    def slow(values: int, device: torch.device) -> Tensor:
        time.sleep(0.2)
        return randoms(values, device)

    monkeypatch.setattr(bandwidth.kernels, "randoms", slow)
    options = {"sizes": [64 * KB], "ways": [way(clock, "copy", "copy", 2, 4321)], "rounds": 5}
    rate = bandwidth.copy_rate(CPU, 0.1, clock.stopwatch, found=HERE, **options)
    assert rate == pytest.approx(4321e9)


def test_the_copy_rate_is_the_best_cold_one_at_large_sizes() -> None:
    clock = Clock()
    ways = [way(clock, "copy", "slow", 2, 1500), way(clock, "copy", "fast", 2, 4321)]
    options = {"sizes": (64 * KB, 32 * KB), "ways": ways, "rounds": 5}
    rate = bandwidth.copy_rate(CPU, 60, clock.stopwatch, found=HERE, **options)
    assert rate == pytest.approx(4321e9)
    with pytest.raises(RuntimeError, match=f"no copy could be measured: {NO_ROOM}"):
        bandwidth.copy_rate(
            CPU, 60, clock.stopwatch, found=dataclasses.replace(HERE, free_bytes=0), **options
        )


def test_the_copy_rate_leaves_out_what_a_cache_helped() -> None:
    clock, last = Clock(), [0]

    def run(source: Tensor, destination: Tensor, processors: int) -> None:
        again, last[0] = source.data_ptr() == last[0], source.data_ptr()
        clock.work(2 * source.nbytes / (9000 if again else 3000) / 1e3)

    ways = [bandwidth.Way("copy", "copy", "copy", 2, run)]
    options = {"sizes": [16 * KB], "ways": ways, "rounds": 5, "found": HERE}
    found = {line.cache: line.GBps for line in bandwidth.bandwidth(CPU, 60, clock.stopwatch, **options)}
    assert found == {"cold": pytest.approx(3000), "warm": pytest.approx(9000)}
    assert bandwidth.copy_rate(CPU, 60, clock.stopwatch, **options) == pytest.approx(3000e9)


def test_the_kernels_own_lines_go_to_a_csv_and_back(tmp_path: Path) -> None:
    lines = list(
        bandwidth.bandwidth(CPU, 60, wall, sizes=[4 * KB], rounds=2, found=Facts(4 * KB, 1 << 30, 4))
    )
    assert [line.variant for line in lines] == [way.name for way in bandwidth.WAYS]
    assert all(line.us and line.GBps for line in lines)
    records.append(tmp_path / "a.csv", lines)
    assert records.read(tmp_path / "a.csv") == lines


# L2


class CachedMemory:
    """A least-recently-used L2 in front of a memory. Bytes from the L2 take no time, others 1 us a page."""

    PAGE = 4096

    def __init__(self, clock: Clock, size: int) -> None:
        self.clock, self.pages = clock, size // self.PAGE
        self.kept: OrderedDict[int, None] = OrderedDict()

    def sweep(self, buffer: Tensor, *rest: object, reverse: bool = False) -> None:
        self.clock.work(1.0)  # so that no time is zero
        pages = range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes, self.PAGE)
        for page in reversed(pages) if reverse else pages:
            if page not in self.kept:
                self.clock.work(1.0)
            self.kept[page] = None
            self.kept.move_to_end(page)
            if len(self.kept) > self.pages:
                self.kept.popitem(last=False)


def test_the_reuse_size_of_a_known_cache_is_found() -> None:
    """In reverse, 64 pages of the largest buffer's 256 are still there: 257 us from memory, 193 otherwise.
    This cache keeps nothing of what is written."""
    clock = Clock()
    found = dataclasses.replace(HERE, l2_bytes=64 * CachedMemory.PAGE)
    memory = CachedMemory(clock, found.l2_bytes)
    sweeps = {"read": memory.sweep, "write": lambda buffer, processors: None}
    lines = list(l2.l2_reuse(CPU, 60, clock.stopwatch, **sweeps, rounds=5, found=found))
    reuse = {line.variant: line for line in lines if line.variant.startswith("L2 reuse")}
    assert {name: line.shape for name, line in reuse.items()} == {
        "L2 reuse: read after write, forwards": "0 B",
        "L2 reuse: read after read, forwards": "256 KiB",
        "L2 reuse: read after write, in reverse": "0 B",
        "L2 reuse: read after read, in reverse": "1 MiB",
    }
    assert [line.note.startswith("at least") for line in reuse.values()] == [False, False, False, True]
    cold = {line.floor_bytes: line.us for line in lines if line.variant == l2.COLD}
    assert cold == {size: 1 + size // 4096 for size in l2.sizes_of(found.l2_bytes, l2.EIGHTHS)}
    warm = [line.us for line in lines if line.cache == "warm" and line.floor_bytes == 32 * 4096]
    assert warm == [33.0, 33.0, 1.0, 1.0]  # after write, after read


def test_a_cache_of_nothing_is_no_reuse() -> None:
    assert l2.reuse({100: (10.0, 10.0 / l2.MARGIN + 0.01)}) == 0
    assert l2.reuse({100: (10.0, 10.0 / l2.MARGIN), 50: (10.0, 1.0)}) == 100


def test_buffers_for_the_l2_that_do_not_fit_are_named() -> None:
    clock = Clock()
    memory = CachedMemory(clock, HERE.l2_bytes)
    small = dataclasses.replace(HERE, free_bytes=4 * (l2.FLUSH + 1) * HERE.l2_bytes)
    lines = list(
        l2.l2_reuse(
            CPU,
            60,
            clock.stopwatch,
            read=memory.sweep,
            write=memory.sweep,
            eighths=(8, 16),
            rounds=5,
            found=small,
        )
    )
    assert [(line.shape, line.note) for line in lines if line.status == "cannot"] == [("128 KiB", NO_ROOM)]
    assert sum(line.status == "measured" for line in lines) == 1 + 4 + 4


def test_the_kernels_sweep() -> None:
    lines = list(l2.l2_reuse(CPU, 60, wall, eighths=(4,), rounds=2, found=Facts(8 * KB, 1 << 30, 4)))
    assert [line.floor_bytes for line in lines] == [4 * KB] * 5 + [None] * 4


# launches and barriers


def test_known_launch_gaps_and_host_times_are_reported() -> None:
    gpu, host = Clock(), Clock()

    def launched(x: Tensor, programs: int) -> None:
        gpu.work(2.0 + programs)
        host.work(11.0)

    def capture(work: launch.Work) -> launch.Work:
        took = gpu.stopwatch(work)
        return lambda: gpu.work(took / 4)

    def stopwatch(work: launch.Work) -> float:
        return gpu.stopwatch(work) + 50  # events cost something, too

    options = {"host": host.stopwatch, "capture": capture, "launch": launched, "rounds": 5, "found": HERE}
    lines = list(launch.launches(CPU, 60, stopwatch, **options))
    assert [(line.variant, line.shape, line.mode, line.us, line.host_us) for line in lines] == [
        ("launch gap", "1 program", "eager", 3.0, None),
        ("launch gap", "1 program", "graph", 0.75, None),
        ("launch gap", "4 programs", "eager", 6.0, None),
        ("launch gap", "4 programs", "graph", 1.5, None),
        ("launch, host", "1 program", "eager", None, 11.0),
    ]


def test_a_known_barrier_is_reported() -> None:
    clock = Clock()

    def meet(arrivals: Tensor, missed: Tensor, barriers: int) -> None:
        assert arrivals.item() == 0
        arrivals.fill_(9)
        clock.work(30 + barriers * 0.25 * missed.numel())

    lines = list(launch.grid_barriers(CPU, 60, clock.stopwatch, meet=meet, rounds=5, found=HERE))
    assert [(line.shape, line.us) for line in lines] == [("4 programs", 1.0), ("2 programs", 0.5)]


def test_barriers_that_nobody_passed_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """As programs run one after another here, the real kernel waits in vain for all but itself."""
    monkeypatch.setattr(kernels, "PATIENCE", 3)
    monkeypatch.setattr(launch, "MANY_BARRIERS", 18)
    two = dataclasses.replace(HERE, processors=2)
    lines = list(launch.grid_barriers(CPU, 60, wall, rounds=2, found=two))
    assert [line.status for line in lines] == ["cannot", "measured"]
    assert "in vain" in lines[0].note
    assert lines[1].shape == "1 program"


def test_probes_are_for_cuda_only() -> None:
    with pytest.raises(ValueError, match="device is cpu; .* CUDA GPUs only"):
        facts(CPU)


def test_sizes_read_well() -> None:
    assert [size_text(n) for n in (0, 1000, 65536, 3 << 19, 1 << 30)] == [
        "0 B",
        "1000 B",
        "64 KiB",
        "1536 KiB",
        "1 GiB",
    ]
