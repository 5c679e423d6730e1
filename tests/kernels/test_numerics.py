"""Every kernel against fp64, on compiled PTX, judged element by element as the GPU tests are: layouts,
dtypes, awkward sizes, memory, parameters, and means far from zero."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import pytest
import torch
from torch import Tensor

from bnfast.checks.cases import Case, group_norm, instance_norm, layer_norm
from bnfast.functional import layer_norm as layer_norm_function
from bnfast.kernels import batch_norm, row_plan
from bnfast.kernels.group_plan import OnePassPlan, plan_one_pass
from tests.support import oracle
from tests.support.buffers import assert_same_bits, bit_identical, nan_filled_allocations
from tests.support.families import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    far_means,
    in_dtypes,
    lacking,
    layouts,
    parameters,
    strides,
    varied,
)  # fmt: skip
from tests.support.layers import both_layouts, data, derivatives

pytestmark = pytest.mark.compiled

OTHERS = (FP16, BF16, FP64)
SHAPES = [
    (8, 24, 7, 7), (3, 16, 14, 14), (5, 13, 3, 4), (4, 3, 9, 9),  # planes, odd C, C 3
    (6, 65, 5, 5), (7, 96, 2, 3), (4, 1, 6, 7),  # C wider than a block, C three quarters of a block, C 1
    (19, 40, 1, 1), (2, 9, 1, 1), (1, 10, 6, 6),  # one position, two values a channel, N 1
    (2, 3, 70, 66), (2, 3, 67, 71), (3, 2, 41, 50),  # runs: in pieces, of odd length, just over a tile
    (300, 4, 1, 3),  # many samples, tiny planes
]  # fmt: skip
# shape and groups
GROUPS = [
    ((2, 8, 8, 16), 2), ((2, 6, 5, 7), 2), ((2, 20, 14, 14), 2),  # one tile, two of odd length, several
    ((1, 4, 44, 44), 2), ((5, 24, 3, 2), 8), ((6, 40, 1, 1), 4),  # a channel in pieces, tiny, one position
    ((6, 30), 3), ((3, 12, 11), 3), ((2, 8, 3, 4, 5), 2),  # 2-D, 3-D of odd length, 5-D
    ((2, 9, 7, 7), 3), ((2, 40, 6, 6), 4), ((3, 12, 4, 8), 4),  # odd positions, 10 and 3 channels a group
    ((3, 7, 4, 8), 7), ((3, 10, 5, 5), 1),  # 1 channel a group, all channels in a group
    ((2, 130, 4, 4), 2), ((1, 32, 6, 6), 8), ((3, 1, 5, 6), 1),  # groups over block borders, N 1, C 1
    ((2, 8, 1, 1), 4),  # two values a group
]  # fmt: skip
# runs, runs of odd length, a wide row
TOO_LARGE_TO_HOLD = [((1, 4, 160, 160), 2), ((2, 6, 75, 149), 2), ((1, 40, 48, 48), 1)]
INSTANCES = [(2, 7, 5, 6), (2, 20, 9), (1, 3, 31, 33), (2, 4, 3, 4, 5)]
# beyond the widths that are held: forward 56 or 64 KB (32 where loaded in singles), backward at most half
LONG_ROWS = [((2, 20000), FP32), ((3, 8201), FP32), ((2, 9000), FP32), ((2, 12296), BF16), ((2, 4100), FP64)]


def of_groups(table: Iterable[tuple[tuple[int, ...], int]]) -> list[Case]:
    return [group_norm(shape, groups=groups) for shape, groups in table]


def both_modes(cases: list[Case]) -> list[Case]:
    return varied(cases, {"training": True}, {"training": False})


# one of each kind of addressing, for what does not depend on sizes
FEW = [Case((8, 24, 7, 7)), Case((5, 13, 3, 4)), Case((2, 3, 70, 66))]
# 10 channels a group, groups over borders of blocks, 1 channel a group
FEW_GROUPS = [((2, 20, 7, 7), 2), ((2, 130, 3, 4), 2), ((3, 8, 6, 6), 8)]
# odd planes, runs in pieces, 1 channel a group, held
FAR_GROUPS = [((2, 20, 9, 9), 2), ((1, 4, 120, 120), 2), ((2, 8, 6, 6), 8), ((2, 8, 16, 16), 2)]
GROUP, ROWS = group_norm((3, 12, 6, 6), groups=3), layer_norm((6, 72))
CASES = {
    "batch": both_modes(layouts(*map(Case, SHAPES))),
    "batch in other dtypes": in_dtypes(both_modes(layouts(*FEW)), OTHERS),
    "group": layouts(*of_groups(GROUPS)),
    "group too large to hold": of_groups(TOO_LARGE_TO_HOLD),
    "instance": in_dtypes(layouts(*map(instance_norm, INSTANCES))),
    "layer": [layer_norm((n, c)) for n in (1, 5) for c in (1, 3, 7, 64, 100, 768, 1000, 4096, 5000)],
    "layer, long rows": [layer_norm(shape, dtype) for shape, dtype in LONG_ROWS],
    "layer in other dtypes": in_dtypes(
        [layer_norm(s) for s in ((9, 7), (33, 64), (6, 100), (4, 768), (3, 1001), (2, 2560))], OTHERS
    ),
    # more rows than a program takes at a time, and a number that does not divide evenly
    "layer, many rows": in_dtypes(
        [layer_norm(s) for s in ((700, 3), (301, 64), (130, 100), (50, 768), (29, 1024))], (BF16, FP32)
    ),
    "memory": [case for one in (Case((3, 12, 6, 6)), GROUP) for case in strides(one) if case.dtype == FP32],
    "memory of rows": varied(
        [ROWS],
        *({"storage": how} for how in ("offset", "sliced")),
        *({"gradient": how} for how in ("offset", "sliced", "transposed", "expanded")),
    ),
    "parameters": varied(
        in_dtypes([*layouts(group_norm((2, 12, 4, 4), groups=3)), ROWS], (BF16, FP32)),
        *({"parameters": dtype} for dtype in DTYPES),
    ),
    "lacking": [
        *lacking(GROUP),
        *varied([ROWS, layer_norm((2, 8201))], {"bias": False}, {"affine": False, "bias": False}),
    ],
}  # fmt: skip
TWO_LAUNCHES = {
    "batch": layouts(*map(Case, SHAPES)),
    "batch in other dtypes": in_dtypes(layouts(*FEW), OTHERS),
    "batch, large means": [case for shape in FEW for case in far_means(shape)],
}
# in the interpreter of several multiprocessors
SPREAD = {
    "group in other dtypes": in_dtypes(layouts(*of_groups(FEW_GROUPS)), OTHERS),
    "group, large means": varied(layouts(*of_groups(FAR_GROUPS)), {"mean": 1e4}, {"mean": -1e6}),
    "layer, large means": [
        layer_norm(shape, dtype, mean=mean)
        for shape, dtype, mean in (
            ((5, 7), FP32, 1e4), ((3, 768), FP32, 1e4), ((2, 5000), FP32, -1e4), ((2, 20000), FP32, 1e4),
            ((5, 100), FP64, 1e8), ((4, 768), FP16, 100.0), ((4, 768), BF16, 100.0),
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", parameters(CASES))
def test_against_fp64(case: Case, device: torch.device) -> None:
    oracle.check(case, device)


@pytest.mark.usefixtures("several_programs", "two_launches")
@pytest.mark.parametrize("case", parameters(TWO_LAUNCHES))
def test_large_batch_norms_against_fp64(case: Case, device: torch.device) -> None:
    """As they are launched where tensors are large."""
    oracle.check(case, device)


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("case", parameters(SPREAD))
def test_against_fp64_on_several_multiprocessors(case: Case, device: torch.device) -> None:
    oracle.check(case, device)


def test_cases_take_every_way() -> None:
    def held(shape: tuple[int, ...], groups: int) -> OnePassPlan | None:
        return plan_one_pass(shape[0], groups, shape[1] // groups, prod(shape[2:]), 4, True, 1)

    tiles = [held(*case).tile for case in GROUPS]
    assert any(t.tiles == 1 and t.groups == 1 for t in tiles)
    assert any(t.tiles > 1 for t in tiles)
    assert any(t.pieces > 1 for t in tiles)
    assert any(t.groups > 1 for t in tiles)
    assert {t.vec for t in tiles} >= {1, 2, 4}
    assert not any(held(*case) for case in TOO_LARGE_TO_HOLD)
    sizes = {(n, width): row_plan.Rows(n, width, dtype.itemsize, True, 2) for (n, width), dtype in LONG_ROWS}
    assert not any(map(row_plan.gradients, sizes.values()))
    two_passes = [shape for shape, size in sizes.items() if row_plan.forward(size)[0] == "two_pass"]
    assert two_passes == [(2, 20000), (3, 8201)]


MOMENTS = [
    (4, 16, 7, 7), (3, 5, 6, 6), (2, 3, 40, 41), (300, 24), (1, 1, 5000), (5, 3, 1, 1), (2, 8, 3, 4, 5)
]  # fmt: skip


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("mean", [0.0, 1e4])
@both_layouts
@pytest.mark.parametrize("shape", MOMENTS, ids=str)
def test_moments(shape: tuple[int, ...], last: bool, mean: float) -> None:
    """A reduction that stops at mean, M2 and count of each channel."""
    x = data(*shape, last=last) + mean
    before = x.clone()
    with nan_filled_allocations():
        found = batch_norm.moments(x).double()
    assert bit_identical(x, before)
    channels = x.double().transpose(0, 1).flatten(1)
    n = channels.shape[1]
    assert (found[2] == n).all()
    torch.testing.assert_close(found[0], channels.mean(1), rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(found[1], n * channels.var(1, correction=0), rtol=2e-6, atol=1e-9 * n)


@pytest.mark.parametrize("dims", [2, 3])
def test_several_dimensions_are_a_row(dims: int) -> None:
    """dims 3: no batch dimension at all."""
    x, dy = data(5, 6, 10), data(5, 6, 10, seed=1)
    vectors = [data(*x.shape[-dims:], seed=n) for n in (2, 3)]

    def flat(t: Tensor) -> Tensor:
        return t.reshape(-1, x.shape[-dims:].numel())

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm_function(x, weight.shape, weight, bias)

    found = derivatives(function, x, vectors, dy)
    expected = derivatives(function, flat(x), [t.flatten() for t in vectors], flat(dy))
    assert_same_bits({name: value.reshape(expected[name].shape) for name, value in found.items()}, expected)
