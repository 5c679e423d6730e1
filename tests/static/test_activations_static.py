"""No activation, and no residual, makes a kernel spill or give up whole vectors."""

from __future__ import annotations

import itertools

import pytest

from bnfast.activation import NAMES, Activation
from bnfast.kernels.one_pass import group_norm_gradients_kernel, group_norm_kernel
from bnfast.kernels.records import OnePassTile
from codegen.sass import bytes_in_flight_per_sm
from tests.support.compiled import compiled
from tests.support.kernel_cases import After, Shape, call, compiled_held
from tests.support.row_cases import call as row_call

pytestmark = pytest.mark.static

SHAPES = [Shape(256, 256, 196, True), Shape(256, 256, 196, False), Shape(256, 64, 12544, False)]
GROUPED = [Shape(16, 320, 4096, True, 32), Shape(1, 128, 512**2, False, 32)]
AFTER = [After(name) for name in NAMES] + [After("relu", "signs"), After("relu", "z"), After("gelu", "z")]
KINDS = ("transform", "gradient_sums", "gradient_transform")


def cases(shapes: list[Shape], after: list[After]) -> list[tuple[str, Shape, After]]:
    """One for each piece of code."""
    found: dict[object, tuple[str, Shape, After]] = {}
    for kind, shape, how in itertools.product(KINDS, shapes, after):
        found.setdefault(call(kind, shape, "bf16", after=how).variant, (kind, shape, how))
    return list(found.values())


def check(kind: str, shape: Shape, after: After, target: str = "sm_90") -> None:
    c = call(kind, shape, "bf16", after=after)
    report = compiled(c, target)
    assert report.spills == 0
    assert report.stack == 0
    if target == "gfx942":
        return
    assert report.registers <= c.sweep.registers
    loads = set(report.main_loop_loads or ())
    assert loads - {1} == {16} if after.residual == "signs" else loads == {16}


@pytest.mark.parametrize(("kind", "shape", "after"), cases(SHAPES[:1], AFTER), ids=str)
def test_every_activation(kind: str, shape: Shape, after: After) -> None:
    check(kind, shape, after)


@pytest.mark.parametrize(
    ("kind", "shape", "after"), cases([*SHAPES[1:], *GROUPED], [AFTER[0], After("relu", "signs")]), ids=str
)
def test_other_ways_through_memory(kind: str, shape: Shape, after: After) -> None:
    check(kind, shape, after)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize(("kind", "shape", "after"), cases(SHAPES[:1], AFTER[:1]), ids=str)
def test_other_gpus(kind: str, shape: Shape, after: After, target: str) -> None:
    check(kind, shape, after, target)


@pytest.mark.parametrize(
    ("kind", "shape", "after"), cases(SHAPES[:2], [After("relu"), After("relu", "signs")]), ids=str
)
def test_relu_keeps_bytes_in_flight(kind: str, shape: Shape, after: After) -> None:
    c = call(kind, shape, "bf16", after=after)
    wanted = {"gradient_sums": 48, "transform": 47, "gradient_transform": 35}[kind]
    assert bytes_in_flight_per_sm(compiled(c), c.sweep.programs / 132) >= wanted * 1024


@pytest.mark.parametrize("residual", ["", "z", "signs"])
@pytest.mark.parametrize("name", ["relu", "gelu"])
@pytest.mark.parametrize(
    "kernel", [group_norm_kernel, group_norm_gradients_kernel], ids=["forward", "backward"]
)
def test_held_groups(kernel: object, name: str, residual: str) -> None:
    """As many tiles as group_plan.py lets a program hold of bf16, 16 warps."""
    if residual == "signs" and name != "relu":
        return
    forward = kernel is group_norm_kernel
    tile = OnePassTile(vec=8, groups=1, channels=4, span=128, pieces=1, tiles=8 if forward else 4)
    constexprs = {"T": tile, "ACT": Activation(name)}
    if not forward and (residual == "z" or name == "gelu"):
        return  # swept
    absent = (
        {"relu_mask_ptr", "residual_ptr"}
        - {f"{residual}_ptr"}
        - ({"residual_ptr"} if forward and residual else set())
    )
    absent |= {"dresidual_ptr"} if not residual else set()
    report = compiled_held(kernel, constexprs, absent, "bf16", 16, 128)
    assert (report.spills, report.stack) == (0, 0)


@pytest.mark.parametrize("name", ["relu", "gelu"])
@pytest.mark.parametrize("width", [64, 768, 8192, 40000])
@pytest.mark.parametrize("kind", ["forward", "activation"])
def test_rows(kind: str, width: int, name: str) -> None:
    c = row_call(kind, 4096, width, "bf16", activation=name, z=True)
    assert c is not None
    report = compiled(c)
    assert (report.spills, report.stack) == (0, 0)
