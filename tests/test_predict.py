"""The networks whose layers are measured, and what is predicted of them: the plan's bytes are those of the
tensors that kernels are given, and those that compiled kernels move; records say what they are."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import model, predict, suites, tables
from benchmarks.cases import of_network
from benchmarks.records import PREDICTED
from benchmarks.suites import SUITES, Network
from bnfast import dispatch
from bnfast.kernels import launch_plan
from bnfast.ptx import Execution
from codegen import launches
from codegen.cases import DIRECTIONS, Case
from codegen.counts import Counts
from tests.support.traffic import Moved, moved

BF16, FP32 = torch.bfloat16, torch.float32
AFTER = ((None, False), ("relu", False), ("relu", True), ("silu", True), (None, True), ("gelu", False))
NETWORKS = [(suite, network) for suite, networks in SUITES.items() for network in networks]
EVERY = pytest.mark.parametrize(("suite", "network"), NETWORKS, ids=lambda each: getattr(each, "name", each))


@EVERY
def test_the_plan_counts_what_launches_are_given(suite: str, network: Network) -> None:
    ways = itertools.product((True, False), (BF16, FP32))
    every = dict.fromkeys(case for last, dtype in ways for case in of_network(suite, network, dtype, last))
    for case, (activation, residual) in itertools.product(every, AFTER):
        case = dataclasses.replace(case, activation=activation, residual=residual)
        found = launches.of_case(case)
        for direction in DIRECTIONS:
            given = sum(each.bytes for each in found[direction]), len(found[direction])
            assert predict.counted(case, direction) == given, (case, direction)


@pytest.fixture
def several_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many SMs for those that run as for those that are recorded, few enough to be quick."""
    monkeypatch.setattr(launches, "SMS", 2)
    monkeypatch.setenv("BNFAST_INTERPRETER_SMS", "2")
    launch_plan.forget_plans()
    yield
    launch_plan.forget_plans()


def total(t: Moved, norm: str) -> int:
    """Bytes of the tensors that `Launched.bytes` counts. Of those that many programs read, each value once
    out and once in."""
    often = {"shares_ptr"} | (set() if norm == "BatchNorm" else launches.TABLES)
    streamed = sum(each.loaded + each.stored for each in t.named(*(launches.DATA | launches.HANDED) - often))
    return streamed + sum(each.unique_read + each.unique_written for each in t.named(*often))


SMALL = [
    *(("BatchNorm", (8, 24, 7, 7), 0, last, *after) for last in (True, False) for after in AFTER[1:4]),
    *(("GroupNorm", (4, 16, 8, 8), 2, last, *after) for last in (True, False) for after in AFTER[:4]),
    ("GroupNorm", (1, 2, 136, 128), 2, False, "relu", True),
    ("InstanceNorm", (2, 8, 6, 6), 8, True, None, True),
    ("LayerNorm", (37, 64), 0, False, None, False),
    ("LayerNorm", (37, 64), 0, False, "gelu", True),
    ("LayerNorm", (2, 29000), 0, False, None, False),
]


@pytest.mark.compiled
@pytest.mark.usefixtures("several_programs", "two_launches")
@pytest.mark.parametrize("made", SMALL, ids=str)
def test_launches_move_what_they_are_given(
    made: tuple[str, tuple[int, ...], int, bool, str | None, bool], executed: list[Execution]
) -> None:
    norm, shape, groups, last, activation, residual = made
    case = Case(norm, shape, groups, torch.float16, last, activation, residual)
    planned = {way: sum(each.bytes for each in found) for way, found in launches.of_case(case).items()}
    layer = launches.layer_of(case)
    given = [case.tensor(torch.device("cpu"), seed).requires_grad_() for seed in range(1 + residual)]
    dy = case.tensor(torch.device("cpu"), 2)
    with moved(executed) as forward:
        y = layer(*given)
    with moved(executed) as backward:
        torch.autograd.grad(y, [*given, *layer.parameters()], dy)
    assert {"forward": total(forward, norm), "backward": total(backward, norm)} == planned


# records


def test_records_say_what_they_are() -> None:
    case = Case("BatchNorm", (256, 64, 56, 56), 0, BF16, True, "relu", True, 6)
    forward, backward = predict.records([case])
    t = case.x_bytes
    for record, passes in ((forward, 4), (backward, 6)):
        assert (record.kind, record.status, record.variant) == ("layer", PREDICTED, "bnfast")
        assert (record.norm, record.groups, record.count) == ("BatchNorm", None, 6)
        assert (record.shape, record.dtype, record.layout) == ("256x64x56x56", "bf16", "channels_last")
        assert (record.activation, record.residual, record.launches) == ("relu", 1, 2)
        assert record.floor_bytes is not None
        assert 0 <= record.floor_bytes - (passes * t + t / 16) < 0.01 * t
        assert record.us == pytest.approx(model.floor(record.floor_bytes) + 2 * model.GAP, abs=0.01)
        assert record.GBps is record.copy_GBps is None  # nothing was measured
        assert tables.FLOOR_LABEL in record.note
        assert "TRITON_INTERPRET" in record.note
        assert record.registers is record.in_flight_KB is record.instructions is record.round_trips is None
    assert (forward.direction, backward.direction) == DIRECTIONS


def test_without_triton_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON", False)
    monkeypatch.setattr(dispatch, "TRITON_VERSION", None)
    (record, _) = predict.records([Case("GroupNorm", (2, 64, 8, 8), 8, FP32, False)])
    assert record.floor_bytes is not None
    assert record.groups == 8
    assert "Triton is not installed" in record.note


def made_up(kernel: str, registers: int, spills: int, in_flight: float, **arguments: Any) -> Any:
    """A launch of 264 programs, of which each of 132 SMs has two, that has a megabyte to move."""
    done = Counts(2000.0, 100.0, 50.0, 3, final_barriers=8, final_round_trips=17)
    code = SimpleNamespace(registers=registers, num_warps=4, shared=1024, spills=spills)
    return SimpleNamespace(
        kernel=kernel, streams=arguments.keys() & {"x_ptr"}, in_flight=in_flight, report=code, counts=done,
        programs=264, arguments=arguments, bytes=2**20, instructions=24.0,
    )  # fmt: skip


def test_the_figures_of_a_layer_are_those_of_its_kernels() -> None:
    """Registers and barriers: the most of all. Bytes in flight: the least of those that go through x or dy.
    Sectors and wavefronts: of all programs; round trips: of all that finalize."""
    case = Case("BatchNorm", (256, 64, 112, 112), 0, BF16, True)
    kernels = [
        made_up("statistics_kernel", 111, 0, 65536.0, x_ptr=0, semaphores_ptr=0),
        made_up("transform_kernel", 64, 2, 49152.0, x_ptr=0),
        made_up("column_sums_kernel", 56, 0, 128.0),
    ]
    record = predict.record(case, "forward", kernels, None)
    assert (record.registers, record.in_flight_KB, record.barriers) == (111, 48.0, 3)
    assert (record.kwavefronts, record.round_trips) == (39.6, 3 * 17)
    assert record.sector_MB == pytest.approx(3 * 264 * 100 * 32e-6, abs=0.01)
    assert record.us == pytest.approx(sum(model.of_launch(each).all for each in kernels), abs=0.01)
    assert record.ran == "statistics_kernel transform_kernel column_sums_kernel"
    assert record.note.endswith("spills: transform_kernel")


def test_a_launch_is_modelled_by_its_parts() -> None:
    """Two programs on each SM; a microsecond has 1755 cycles."""
    streams = made_up("transform_kernel", 64, 0, 49152.0, x_ptr=0)
    expected = (1000 / 1755, 1.5, 2 * 50 / 1755, 0.0)  # 4000 instructions, four a cycle, beat a megabyte
    assert model.of_launch(streams) == pytest.approx(expected)
    streams.bytes = 43 * 10**6
    assert model.of_launch(streams).streaming == pytest.approx(10.0)
    streams.programs = 264 * 50  # no more run at a time than fit
    assert model.of_launch(streams).shared == pytest.approx(8 * 50 / 1755)
    waits = made_up("column_sums_kernel", 56, 0, 128.0)
    assert model.of_launch(waits).streaming == pytest.approx(2**20 / (128 * 132) * 0.7 + 3 * 30 / 1755)
    finalizes = made_up("statistics_kernel", 64, 0, 65536.0, x_ptr=0, semaphores_ptr=0)
    assert model.of_launch(finalizes).finalizing == pytest.approx((900 + 17 * 390 + 8 * 30) / 1755)
    assert model.uncounted(43 * 10**6, 2) == (10.0, 3.0, 0.0, 0.0)


# the networks


@pytest.mark.parametrize(("name", "distinct", "total", "after"), [
    ("ResNet-50", 12, 5_690_359_808, {("relu", False): 33, ("relu", True): 16, (None, False): 4}),
    ("SD 1.5 UNet", 14, 1_441_792_000, {("silu", False): 45, (None, False): 16}),
    ("SDXL UNet", 12, 618_659_840, {("silu", False): 35, (None, False): 11}),
    ("SD 1.5 VAE decoder", 6, 918_552_576, {("silu", False): 29, (None, False): 1}),
    ("SDXL VAE decoder", 6, 3_674_210_304, {("silu", False): 29, (None, False): 1}),
    ("nnU-Net 3-D", 6, 1_428_848_640, {("leaky_relu", False): 22}),
    ("3-D U-Net", 11, 819_986_432, {(None, False): 14}),
])  # fmt: skip
def test_layers_are_known(
    name: str, distinct: int, total: int, after: dict[tuple[str | None, bool], int]
) -> None:
    """Their sizes, bytes in 16 bits, and what follows them: of each block of ResNet-50 the third norm is
    followed by an addition, and four ways round have a norm alone."""
    (network,) = (each for _, each in NETWORKS if each.name == name)
    sizes = [(shape.channels, *shape.size) for shape in network.layers]
    assert len(set(sizes)) == distinct
    assert 2 * network.batch * sum(map(prod, sizes)) == total
    assert Counter((shape.activation, shape.residual) for shape in network.layers) == after


@EVERY
@pytest.mark.parametrize("layout", suites.LAYOUTS)
def test_counted_bytes_are_the_sweeps_and_little_more(suite: str, network: Network, layout: str) -> None:
    """Groups divide channels, as torch's own layers want. channels_last, only small tensors are read once."""
    found = of_network(suite, network, BF16, layout == "channels_last")
    assert sum(case.count for case in found) == len(network.layers)
    batch_norm = network.norm == "BatchNorm"
    sweeps = {"forward": (2, 3, 2), "backward": (3, 5, 2 if batch_norm else 3)}
    for case, (direction, (once, twice, sweeping)) in itertools.product(found, sweeps.items()):
        assert case.groups == 0 if batch_norm else case.shape[1] % case.groups == 0
        moved, launched = predict.counted(case, direction)
        assert launched == sweeping or layout == "contiguous" or suite == "small"
        passes = (twice if launched == sweeping else once) + case.residual
        bits = (case.shape[1] if case.channels_last else prod(case.shape[2:])) % 8 == 0
        mask = case.residual * prod(case.shape) // (8 if bits else 1)
        # cells of 64 values hand over a good part of what they are; those that matter do not
        spare = 1.04 if case.x_bytes > 5e7 else 1.7
        assert passes * case.x_bytes + mask <= moved <= spare * (passes * case.x_bytes + mask)
