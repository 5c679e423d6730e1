"""Every kernel against fp64, in the interpreter, judged element by element as the GPU tests are: layouts,
dtypes, awkward sizes, memory, parameters, and means far from zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bnfast.checks.cases import Case, group_norm, instance_norm, layer_norm
from bnfast.functional import layer_norm as layer_norm_function
from bnfast.kernels import row_plan
from bnfast.kernels.group_plan import OnePassPlan, plan_one_pass
from tests.support import oracle
from tests.support.buffers import bit_identical
from tests.support.families import BF16, DTYPES, FP16, FP32, FP64, in_dtypes, lacking, layouts, strides
from tests.support.layers import data, derivatives

CPU = torch.device("cpu")
OTHERS = (FP16, BF16, FP64)
SHAPES = {
    "7x7 planes": (8, 24, 7, 7),
    "14x14 planes": (3, 16, 14, 14),
    "odd C": (5, 13, 3, 4),
    "C 3": (4, 3, 9, 9),
    "C 65, wider than a block": (6, 65, 5, 5),
    "C 96, three quarters of a block": (7, 96, 2, 3),
    "C 1": (4, 1, 6, 7),
    "one position": (19, 40, 1, 1),
    "two values a channel": (2, 9, 1, 1),
    "N 1": (1, 10, 6, 6),
    "a run in pieces": (2, 3, 70, 66),
    "a run of odd length": (2, 3, 67, 71),
    "a run just over a tile": (3, 2, 41, 50),
    "many samples, tiny planes": (300, 4, 1, 3),
}
GROUPS = {
    "one tile": ((2, 8, 8, 16), 2),
    "two tiles, odd length": ((2, 6, 5, 7), 2),
    "several tiles": ((2, 20, 14, 14), 2),
    "a channel in pieces": ((1, 4, 44, 44), 2),
    "tiny cells": ((5, 24, 3, 2), 8),
    "one position": ((6, 40, 1, 1), 4),
    "2-D": ((6, 30), 3),
    "3-D, odd length": ((3, 12, 11), 3),
    "5-D": ((2, 8, 3, 4, 5), 2),
    "odd positions": ((2, 9, 7, 7), 3),
    "10 channels a group": ((2, 40, 6, 6), 4),
    "3 channels a group": ((3, 12, 4, 8), 4),
    "1 channel a group": ((3, 7, 4, 8), 7),
    "all channels in a group": ((3, 10, 5, 5), 1),
    "groups over block borders": ((2, 130, 4, 4), 2),
    "N 1": ((1, 32, 6, 6), 8),
    "C 1": ((3, 1, 5, 6), 1),
    "two values a group": ((2, 8, 1, 1), 4),
}
TOO_LARGE_TO_HOLD = {
    "nchw": ((1, 4, 160, 160), 2),
    "runs of odd length": ((2, 6, 75, 149), 2),
    "a wide row": ((1, 40, 48, 48), 1),
}
INSTANCES = [(2, 7, 5, 6), (2, 20, 9), (1, 3, 31, 33), (2, 4, 3, 4, 5)]
# beyond the widths that are held: forward 56 or 64 KB (32 where loaded in singles), backward at most half
LONG_ROWS = [((2, 20000), FP32), ((3, 8201), FP32), ((2, 9000), FP32), ((2, 12296), BF16), ((2, 4100), FP64)]


def of_groups(table: dict[str, tuple[tuple[int, ...], int]]) -> list[Case]:
    return [group_norm(shape, groups=groups) for shape, groups in table.values()]


def both_modes(cases: list[Case]) -> list[Case]:
    return [replace(case, training=training) for case in cases for training in (True, False)]


# one of each kind of addressing, for what does not depend on sizes
FEW = [Case((8, 24, 7, 7)), Case((5, 13, 3, 4)), Case((2, 3, 70, 66))]
FEW_GROUPS = {
    "10 a group": ((2, 20, 7, 7), 2),
    "borders": ((2, 130, 3, 4), 2),
    "1 a group": ((3, 8, 6, 6), 8),
}
FAR_GROUPS = {
    "odd planes": ((2, 20, 9, 9), 2),
    "pieces": ((1, 4, 120, 120), 2),
    "1 a group": ((2, 8, 6, 6), 8),
    "held": ((2, 8, 16, 16), 2),
}
GROUP, ROWS = group_norm((3, 12, 6, 6), groups=3), layer_norm((6, 72))
CASES = {
    "batch": both_modes(layouts(*map(Case, SHAPES.values()))),
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
    "memory of rows": [replace(ROWS, storage=how) for how in ("offset", "sliced")]
    + [replace(ROWS, gradient=how) for how in ("offset", "sliced", "transposed", "expanded")],
    "parameters": [
        replace(case, dtype=dtype, parameters=parameters)
        for case in (*layouts(group_norm((2, 12, 4, 4), groups=3)), ROWS)
        for dtype in (BF16, FP32)
        for parameters in DTYPES
    ],
    "lacking": [
        *lacking(GROUP),
        *(replace(ROWS, affine=affine, bias=False) for affine in (True, False)),
        *(layer_norm((2, 8201), affine=affine, bias=False) for affine in (True, False)),
    ],
}  # fmt: skip
# in the interpreter of several multiprocessors
SPREAD = {
    "group in other dtypes": in_dtypes(layouts(*of_groups(FEW_GROUPS)), OTHERS),
    "group, large means": [
        replace(case, mean=mean) for case in layouts(*of_groups(FAR_GROUPS)) for mean in (1e4, -1e6)
    ],
    "layer, large means": [
        layer_norm(shape, dtype, mean=mean)
        for shape, dtype, mean in (
            ((5, 7), FP32, 1e4), ((3, 768), FP32, 1e4), ((2, 5000), FP32, -1e4), ((2, 20000), FP32, 1e4),
            ((5, 100), FP64, 1e8), ((4, 768), FP16, 100.0), ((4, 768), BF16, 100.0),
        )
    ],
}  # fmt: skip


def parameters(groups: dict[str, list[Case]]) -> pytest.MarkDecorator:
    cases = [pytest.param(case, id=f"{name}-{case}") for name, these in groups.items() for case in these]
    return pytest.mark.parametrize("case", cases)


@parameters(CASES)
def test_against_fp64(case: Case) -> None:
    oracle.check(case, CPU)


@pytest.mark.usefixtures("several_programs")
@parameters(SPREAD)
def test_against_fp64_on_several_multiprocessors(case: Case) -> None:
    oracle.check(case, CPU)


def held(shape: tuple[int, ...], groups: int) -> OnePassPlan | None:
    return plan_one_pass(shape[0], groups, shape[1] // groups, torch.Size(shape[2:]).numel(), 4, True, 1)


def test_groups_take_every_way() -> None:
    plans = [held(*case) for case in GROUPS.values()]
    assert all(plans)
    tiles = [p.tile for p in plans if p]
    assert any(t.tiles == 1 and t.groups == 1 for t in tiles)
    assert any(t.tiles > 1 for t in tiles)
    assert any(t.pieces > 1 for t in tiles)
    assert any(t.groups > 1 for t in tiles)
    assert {t.vec for t in tiles} >= {1, 2, 4}
    assert not any(held(*case) for case in TOO_LARGE_TO_HOLD.values())


@pytest.mark.parametrize(("shape", "dtype"), LONG_ROWS, ids=str)
def test_rows_that_are_not_held(shape: tuple[int, int], dtype: torch.dtype) -> None:
    size = row_plan.Rows(*shape, dtype.itemsize, True, 2)
    assert row_plan.forward(size)[0] == ("long" if shape[1] in (20000, 8201) else "held")
    assert row_plan.gradients(size) is None


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
    for name, value in expected.items():
        assert bit_identical(found[name].reshape(value.shape), value), name
