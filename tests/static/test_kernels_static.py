"""The kernels as machine code: no spills, whole vectors, registers as planned, enough bytes in flight, a
short epilogue.

No GPU is involved. Shapes that compile to the same code are compiled once.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from bnfast.kernels import batch_norm, plan
from codegen import launches, sass
from codegen.sass import Report, bytes_in_flight_per_sm
from tests.support.compiled import compiled
from tests.support.kernel_cases import ITEMSIZES, KINDS, Call, Shape, call

pytestmark = pytest.mark.static

SMS = 132  # of an H200
RESNET50 = [
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 56),
    (128, 28),
    (512, 28),
    (256, 28),
    (256, 14),
    (1024, 14),
] + [
    (512, 14),
    (512, 7),
    (2048, 7),
]
BATCHES = (256, 64)
OTHERS = [
    Shape(8, 24, 49, True), Shape(8, 24, 49, False), Shape(256, 65, 196, True), Shape(4, 3, 100, True),
    Shape(64, 96, 49, True), Shape(128, 1000, 1, True), Shape(1, 1, 10**6, False), Shape(2, 32, 64**3, False),
]  # fmt: skip
ODD = [Shape(64, 3, 1225, False), Shape(32, 1001, 16, True), Shape(3, 7, 11, False)]
# How much x must hold before a GPU of 132 SMs counts as filled: eight rounds of 48 KB for each. Below, a
# program's loop is too short to pay for its epilogue, whatever the plan.
FILLS = 8 * SMS * 48 * 1024


def resnet(dtype: str) -> list[Shape]:
    return [Shape(n, c, hw * hw, last) for n in BATCHES for c, hw in RESNET50 for last in (True, False)]


def variants(shapes: list[Shape], dtypes: tuple[str, ...]) -> list[tuple[str, Shape, str]]:
    """One case for each piece of code that these shapes need."""
    cases: dict[tuple[object, ...], tuple[str, Shape, str]] = {}
    for dtype, kind, shape in itertools.product(dtypes, KINDS, shapes):
        cases.setdefault(call(kind, shape, dtype).variant, (kind, shape, dtype))
    return list(cases.values())


@pytest.mark.parametrize(("kind", "shape", "dtype"), variants(resnet("bf16") + OTHERS, ("bf16",)), ids=str)
def test_hopper_bf16(kind: str, shape: Shape, dtype: str) -> None:
    check_code(kind, shape, dtype)


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    variants(
        [Shape(64, 256, 196, True), Shape(64, 256, 196, False), OTHERS[0], OTHERS[2], OTHERS[6]],
        ("fp16", "fp32", "fp64"),
    ),
    ids=str,
)
def test_hopper_other_dtypes(kind: str, shape: Shape, dtype: str) -> None:
    check_code(kind, shape, dtype)


def check_code(kind: str, shape: Shape, dtype: str) -> None:
    c = call(kind, shape, dtype)
    report = compiled(c)
    assert report.spills == 0
    assert report.stack == 0
    assert report.registers <= c.sweep.registers
    assert c.sweep.vec * ITEMSIZES[dtype] == 16, "the plan gives up whole vectors for this shape"
    assert report.main_loop_loads is not None
    assert set(report.main_loop_loads) == {16}, report.main_loop_loads
    assert report.stores.get(16, 0) > 0 or kind in ("statistics", "gradient_sums")


@pytest.mark.parametrize(("kind", "shape", "dtype"), variants(ODD, ("bf16",)), ids=str)
def test_sizes_that_forbid_vectors_still_do_not_spill(kind: str, shape: Shape, dtype: str) -> None:
    assert compiled(call(kind, shape, dtype)).spills == 0


@pytest.mark.parametrize("kind", ["transform", "gradient_sums"])
@pytest.mark.parametrize("shape", [Shape(64, 256, 196, True), Shape(64, 256, 196, False)], ids=str)
def test_eval(kind: str, shape: Shape) -> None:
    report = compiled(call(kind, shape, "bf16", evaluating=True))
    assert report.spills == 0
    assert set(report.main_loop_loads or ()) == {16}
    assert report.stores.get(16, 0) > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [Shape(64, 256, 196, True), Shape(64, 256, 196, False), OTHERS[2], OTHERS[6]], ids=str
)
def test_other_gpus(shape: Shape, kind: str, target: str) -> None:
    report = compiled(call(kind, shape, "bf16"), target)
    assert report.spills == 0
    assert report.loads.get(16, 0) > 0


def large(dtype: str = "bf16") -> list[Shape]:
    return [s for s in resnet(dtype) if s.n * s.c * s.s * ITEMSIZES[dtype] >= FILLS]


def test_enough_shapes_count_as_large() -> None:
    """The large ones are most of what ResNet-50 moves at batch 256, and about half at 64."""
    for n, share in ((256, 0.85), (64, 0.45)):
        sizes = {(s.c, s.s): s.c * s.s for s in resnet("bf16") if s.n == n}
        filled = {(s.c, s.s) for s in large() if s.n == n}
        assert sum(sizes[k] for k in filled) >= share * sum(sizes.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", large(), ids=str)
def test_a_planned_grid_keeps_48_kb_in_flight_an_sm(shape: Shape, kind: str) -> None:
    c = call(kind, shape, "bf16")
    assert bytes_in_flight_per_sm(compiled(c), c.sweep.programs / SMS) >= 48 * 1024


@pytest.mark.parametrize("kind", ["statistics", "gradient_sums"])
@pytest.mark.parametrize("shape", large(), ids=str)
def test_the_epilogue_is_at_most_a_quarter_of_the_main_loop(shape: Shape, kind: str) -> None:
    c = call(kind, shape, "bf16")
    report = compiled(c)
    assert report.main_loop_instructions is not None
    assert report.epilogue_instructions is not None
    main = (
        report.main_loop_instructions * c.sweep.tiles / c.sweep.splits
    )  # a program's first tile, peeled, counts as one
    assert epilogue(c, report) <= main / 4


def epilogue(c: Call, report: Report) -> float:
    """Instructions that a program runs between its loop and its atomic. Folding lanes into channels is a
    loop of its own.
    """
    assert report.epilogue_instructions is not None
    assert report.repeated_instructions is not None
    view = c.sweep.view
    held = {
        "nchw_packed": view.width // view.inner,
        "nhwc_packed": view.channels,
        "rows": view.lanes,
        "nchw": 1,
    }[view.mode]
    turns = plan.ceil_div(held, c.sweep.fold) if report.epilogue_loops else 1
    return report.epilogue_instructions + (turns - 1) * report.repeated_instructions


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_moments(channels_last: bool) -> None:
    """The reduction that stops at the moments is as tight as BatchNorm's."""
    x = torch.empty(256, 64, 56, 56, dtype=torch.bfloat16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with launches.recording() as found:
        batch_norm.moments(x)
    (launched,) = found
    report = sass.report(launched.code)
    assert (report.spills, report.stack) == (0, 0)
    assert max(report.main_loop_loads or report.loads) == 16
