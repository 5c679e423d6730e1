"""GroupNorm with an activation against fp64 formulas: in one pass and in two, forward and backward."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bnfast.activation import Activation
from bnfast.functional import group_norm
from bnfast.kernels.group_plan import ONE_PASS_TILES_OF_SMOOTH, plan_one_pass
from bnfast.kernels.records import OnePassTile
from tests.support.buffers import nan_filled_allocations
from tests.support.layers import both_layouts

pytestmark = pytest.mark.compiled

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# 10 channels a group, which is no power of two, of planes of vectors and of odd ones; a channel in pieces;
# several groups a program; 3 sets of channels of a group, which are all full, and of which the last is not
SHAPES = [
    ((2, 320, 4, 4), 32), ((2, 20, 5, 3), 2), ((1, 4, 44, 44), 2), ((5, 24, 2, 4), 8), ((1, 12, 16, 8), 1),
    ((2, 20, 16, 8), 2),
]  # fmt: skip
Results = list[Tensor]


def step(
    norm: object, shape_and_groups: tuple[tuple[int, ...], int], x: Tensor, dy: Tensor, activation: str
) -> Results:
    """y, dx, dweight and dbias, in x's dtype."""
    shape, groups = shape_and_groups
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.empty(shape[1]).uniform_(low, low + 1, generator=generator) for low in (0.5, -0.5))
    given = [t.detach().clone().to(x.dtype).requires_grad_() for t in (x, weight.bfloat16(), bias.bfloat16())]
    if norm is group_norm:
        with nan_filled_allocations():
            y = group_norm(given[0], groups, *given[1:], activation=activation)
            found = [y, *torch.autograd.grad(y, given, dy.to(x.dtype))]
        assert torch.equal(given[0], x)
        return found
    y = Activation.of(activation).apply(F.group_norm(given[0], groups, *given[1:]))
    return [y, *torch.autograd.grad(y, given, dy.to(x.dtype))]


def check(
    shape_and_groups: tuple[tuple[int, ...], int], activation: str, dtype: torch.dtype, last: bool,
    mean: float = 0.5, std: float = 1.0,
) -> None:  # fmt: skip
    """Errors are at most twice torch's and a few units in the last place, of the largest value."""
    shape, _ = shape_and_groups
    generator = torch.Generator().manual_seed(5)
    memory = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    x = (x * std + mean).to(dtype, memory_format=memory)
    dy = dy.to(dtype, memory_format=memory)
    ours = step(group_norm, shape_and_groups, x, dy, activation)
    torchs = step(F, shape_and_groups, x, dy, activation)
    exact = step(F, shape_and_groups, x.double(), dy, activation)
    for name, found, theirs, true in zip(("y", "dx", "dweight", "dbias"), ours, torchs, exact, strict=True):
        off, allowed = (found.double() - true).abs().max(), (theirs.double() - true).abs().max()
        assert off <= 2 * allowed + 4 * torch.finfo(dtype).eps * true.abs().max(), (name, off, allowed)


@both_layouts
@pytest.mark.parametrize("activation", ["silu", "gelu", "mish", "relu", "elu"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_activation(case: tuple[tuple[int, ...], int], activation: str, last: bool) -> None:
    check(case, activation, FP32, last)


@both_layouts
@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("case", SHAPES[:2], ids=str)
def test_activation_in_other_dtypes(
    case: tuple[tuple[int, ...], int], dtype: torch.dtype, last: bool
) -> None:
    check(case, "silu", dtype, last)


@both_layouts
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.5), (300.0, 2.0), (1.0, 0.004)])
def test_statistics_of_few_digits(mean: float, std: float, last: bool) -> None:
    """bf16 numbers that differ in their last bits alone: statistics are those of the numbers as they are."""
    check(((2, 20, 8, 8), 2), "silu", BF16, last, mean, std)


def test_shapes_take_every_way() -> None:
    def tile(case: tuple[tuple[int, ...], int], inputs: int) -> OnePassTile | None:
        (n, c, *size), groups = case
        plan = plan_one_pass(n, groups, c // groups, prod(size), 4, True, inputs, "silu")
        return None if plan is None else plan.tile

    tiles = [tile(case, 2) for case in SHAPES]
    assert any(t and t.pieces > 1 for t in tiles)
    assert any(t and t.groups > 1 for t in tiles)
    left = set()  # channels of the last of 3 sets
    for ((_, c, *_), groups), t in zip(SHAPES, tiles, strict=True):
        if t and t.tiles // t.pieces == 3:
            left.add(c // groups - 2 * t.channels)
            assert t.channels == 4
    assert left == {2, 4}


def test_smooth_slopes_take_registers() -> None:
    """Groups of 40 KB: dy and x fit beside a slope that is linear piece by piece."""
    group = (20, 32 * 32)
    for activation, fits in (("none", True), ("relu", True), ("silu", False), ("gelu", False)):
        plan = plan_one_pass(2, 32, *group, 2, True, 2, activation)
        assert (plan is not None) is fits, activation
    smaller = plan_one_pass(2, 32, 16, 32 * 32, 2, True, 2, "gelu")
    assert smaller is not None
    assert smaller.tile.tiles == ONE_PASS_TILES_OF_SMOOTH
