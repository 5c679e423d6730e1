"""The networks whose layers are measured, and what is predicted of them: the plan's bytes are those of the
tensors that kernels are given, and those that kernels move in the interpreter; records say what they are."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import predict, suites, tables
from benchmarks.cases import of_network
from benchmarks.records import PREDICTED
from benchmarks.suites import SUITES, Network, Shape, cube, square
from bnfast import dispatch
from bnfast.kernels import launch_plan
from codegen import launches
from codegen.cases import DIRECTIONS, Case
from tests.support.trace import Trace, trace

BF16, FP32 = torch.bfloat16, torch.float32
AFTER = ((None, False), ("relu", False), ("relu", True), ("silu", True), (None, True), ("gelu", False))
NETWORKS = [(suite, network) for suite, networks in SUITES.items() for network in networks]
EVERY = pytest.mark.parametrize(("suite", "network"), NETWORKS, ids=lambda each: getattr(each, "file", each))


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


def moved(t: Trace, norm: str) -> int:
    """Bytes of the tensors that `Launched.bytes` counts. Of those that many programs read, each value once
    out and once in."""
    often = {"shares_ptr"} | (set() if norm == "BatchNorm" else launches.TABLES)
    names = {name: name.partition(".")[0] for name in t.traffic}  # the kernels' own, where several share one
    streamed = [name for name, own in names.items() if own in (launches.DATA | launches.HANDED) - often]
    tables = [t[name] for name, own in names.items() if own in often]
    return t.moved(*streamed) + sum(each.unique_read + each.unique_written for each in tables)


SMALL = [
    *(("BatchNorm", (8, 24, 7, 7), 0, last, *after) for last in (True, False) for after in AFTER[1:4]),
    *(("GroupNorm", (4, 16, 8, 8), 2, last, *after) for last in (True, False) for after in AFTER[:4]),
    ("GroupNorm", (1, 2, 136, 128), 2, False, "relu", True),
    ("InstanceNorm", (2, 8, 6, 6), 8, True, None, True),
    ("LayerNorm", (37, 64), 0, False, None, False),
    ("LayerNorm", (37, 64), 0, False, "gelu", True),
    ("LayerNorm", (2, 29000), 0, False, None, False),
]


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("made", SMALL, ids=str)
def test_launches_move_what_they_are_given(
    made: tuple[str, tuple[int, ...], int, bool, str | None, bool],
) -> None:
    norm, shape, groups, last, activation, residual = made
    case = Case(norm, shape, groups, torch.float16, last, activation, residual)
    planned = {way: sum(each.bytes for each in found) for way, found in launches.of_case(case).items()}
    layer = launches.layer_of(case)
    given = [case.tensor(torch.device("cpu"), seed).requires_grad_() for seed in range(1 + residual)]
    dy = case.tensor(torch.device("cpu"), 2)
    with trace(x_ptr=given[0]) as forward:
        y = layer(*given)
    with trace(x_ptr=given[0], dy_ptr=dy) as backward:
        torch.autograd.grad(y, [*given, *layer.parameters()], dy)
    assert {"forward": moved(forward, norm), "backward": moved(backward, norm)} == planned


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
        assert record.us == pytest.approx(tables.floor(record.floor_bytes), abs=0.01)
        assert record.GBps is record.copy_GBps is None  # nothing was measured
        assert tables.FLOOR_LABEL in record.note
        assert "TRITON_INTERPRET" in record.note
        assert record.registers is record.in_flight_KB is None
    assert (forward.direction, backward.direction) == DIRECTIONS


def test_without_triton_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON", False)
    monkeypatch.setattr(dispatch, "TRITON_VERSION", None)
    (record, _) = predict.records([Case("GroupNorm", (2, 64, 8, 8), 8, FP32, False)])
    assert record.floor_bytes is not None
    assert record.groups == 8
    assert "Triton is not installed" in record.note


def test_a_worse_figure_is_that_of_the_kernel_that_streams() -> None:
    """Registers: the most of all. Bytes in flight: the least of those that go through x or dy."""
    case = Case("BatchNorm", (256, 64, 112, 112), 0, BF16, True)
    kernels: list[Any] = [
        SimpleNamespace(
            kernel=kernel, streams=streams, in_flight=in_flight,
            report=SimpleNamespace(registers=registers, spills=spills),
        )
        for kernel, streams, registers, spills, in_flight in (
            ("statistics_kernel", True, 111, 0, 65536.0),
            ("transform_kernel", True, 64, 2, 49152.0),
            ("column_sums_kernel", False, 56, 0, 128.0),
        )
    ]  # fmt: skip
    record = predict.record(case, "forward", kernels, None)
    assert (record.registers, record.in_flight_KB) == (111, 48.0)
    assert record.ran == "statistics_kernel transform_kernel column_sums_kernel"
    assert record.note.endswith("spills: transform_kernel")


def test_other_layers_have_no_plan() -> None:
    with pytest.raises(ValueError, match="one of BatchNorm, GroupNorm, InstanceNorm .* not 'LayerNorm'"):
        predict.counted(Case("LayerNorm", (4, 64), 0, BF16, False), "forward")


# the networks


@pytest.mark.parametrize(("file", "layers", "distinct", "total"), [
    ("resnet50", 53, 12, 5_690_359_808), ("sd15-unet", 61, 14, 1_441_792_000),
    ("sdxl-unet", 46, 12, 618_659_840), ("sd15-vae", 30, 6, 918_552_576),
    ("sdxl-vae", 30, 6, 3_674_210_304), ("nnunet3d", 22, 6, 1_428_848_640), ("unet3d", 14, 11, 819_986_432),
])  # fmt: skip
def test_layers_are_known(file: str, layers: int, distinct: int, total: int) -> None:
    network = next(network for _, network in NETWORKS if network.file == file)
    assert (len(network.layers), len({shape.alone for shape in network.layers})) == (layers, distinct)
    assert sum(shape.bytes(network.batch, 2) for shape in network.layers) == total


@pytest.mark.parametrize(("network", "shape", "times"), [
    (suites.RESNET50, square(64, 112), 1),
    (suites.RESNET50, square(256, 56), 4),  # three blocks and one way round
    (suites.RESNET50, square(2048, 7), 4),
    (suites.SD15_UNET, square(960, 64), 1),  # where 640 channels meet 320 of the way down
    (suites.SD15_UNET, square(2560, 8), 3),
    (suites.SDXL_UNET, square(1280, 32), 16),
    (suites.SDXL_VAE, square(128, 1024), 6),
    (suites.NNUNET, cube(320, 4), 2),
    (suites.UNET3D, cube(96, 128), 1),
], ids=str)  # fmt: skip
def test_a_shape_occurs_so_often(network: Network, shape: Shape, times: int) -> None:
    assert [each.alone for each in network.layers].count(shape) == times


@EVERY
@pytest.mark.parametrize("layout", suites.LAYOUTS)
def test_counted_bytes_are_the_sweeps_and_little_more(suite: str, network: Network, layout: str) -> None:
    """Groups divide channels, as torch's own layers want."""
    for shape in set(network.layers):
        groups = network.groups_of(shape)
        assert (groups == 0) == (network.norm == "BatchNorm")
        assert groups == 0 or shape.channels % groups == 0
    found = of_network("suite", network, torch.bfloat16, layout == "channels_last")
    assert sum(case.count for case in found) == len(network.layers)
    for case in found:
        moved, launches = predict.counted(case, "forward")
        back, launches_back = predict.counted(case, "backward")
        swept, swept_back = launches == 2, launches_back == 3
        if network.norm == "BatchNorm":
            swept_back = launches_back == 2
        assert swept or layout == "contiguous"
        passes, passes_back = (3 if swept else 2) + case.residual, (5 if swept_back else 3) + case.residual
        # cells of 64 values hand over a good part of what they are; those that matter do not
        spare = 1.04 if case.x_bytes > 5e7 else 1.7
        assert passes * case.x_bytes <= moved <= spare * passes * case.x_bytes
        assert passes_back * case.x_bytes <= back <= spare * passes_back * case.x_bytes


def test_what_follows_is_known() -> None:
    """16 blocks of ResNet-50 add before the last ReLU; four ways round have a norm alone."""
    layers = suites.RESNET50.layers
    assert [sum(s.after == after for s in layers) for after in (" relu", " + z relu", "")] == [33, 16, 4]
    assert {s.activation for s in suites.SD15_UNET.layers} == {"silu", None}
    assert {s.activation for s in suites.NNUNET.layers} == {"leaky_relu"}


def test_small_contiguous_groups_are_read_once() -> None:
    found = of_network("sd-unet", suites.SD15_UNET, torch.bfloat16, channels_last=False)
    launches = {
        case.shape[1:]: tuple(predict.counted(case, way)[1] for way in DIRECTIONS)
        for case in found
        if case.activation is None
    }
    assert launches[1280, 16, 16] == (1, 2)
    assert launches[320, 64, 64] == (1, 3)  # 80 KB of x, and not as much of x and dy
    assert launches[640, 32, 32] == (1, 3)
