"""GroupNorm's kernels against fp64, in the interpreter, on shapes that take every way through them. What they
move is in test_traffic_groups.py, the rest of the function and the layer in test_groupnorm_layer.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnfast import exact
from bnfast.functional import group_norm
from bnfast.kernels.cell_plan import CellSweep, cell_sweep
from tests.support import kernel_calls as kernels
from tests.support.buffers import bit_identical, guarded, nan_filled_allocations
from tests.support.cooperative import shuffled
from tests.support.group_cases import EPS, by_kernels, check, given, run

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BOTH = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
SHAPES = {
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
LARGE = {
    "runs": ((1, 4, 160, 160), 2),
    "runs of odd length": ((2, 6, 75, 149), 2),
    "a wide row": ((1, 40, 48, 48), 1),
}


def passes(shape: tuple[int, ...], groups: int, dtype: torch.dtype = FP32, **options: object) -> None:
    g = given(shape, groups, dtype, **options)  # type: ignore[arg-type]
    with nan_filled_allocations():
        ours = run(group_norm, g)
    check(g, ours)


def held(shape: tuple[int, ...], groups: int, dtype: torch.dtype = FP32) -> CellSweep | None:
    positions = torch.Size(shape[2:]).numel()
    return cell_sweep(shape[0], groups, shape[1] // groups, positions, dtype.itemsize, True, 1)


@BOTH
@pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape: tuple[int, ...], groups: int, layout: str) -> None:
    passes(shape, groups, layout=layout)


def test_shapes_take_every_way() -> None:
    plans = {name: held(*case) for name, case in SHAPES.items()}
    assert all(plans.values())
    assert any(p.tiles == 1 and p.groups == 1 for p in plans.values() if p)
    assert any(p.tiles > 1 for p in plans.values() if p)
    assert any(p.pieces > 1 for p in plans.values() if p)
    assert any(p.groups > 1 for p in plans.values() if p)
    assert {p.vec for p in plans.values() if p} >= {1, 2, 4}
    assert not any(held(*case) for case in LARGE.values())


@pytest.mark.parametrize(("shape", "groups"), LARGE.values(), ids=LARGE.keys())
def test_cells_too_large_to_hold(shape: tuple[int, ...], groups: int) -> None:
    passes(shape, groups)


@pytest.mark.usefixtures("several_programs")
@BOTH
@pytest.mark.parametrize("dtype", [FP16, BF16, FP64], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((2, 20, 7, 7), 2), ((2, 130, 3, 4), 2), ((3, 8, 6, 6), 8)])
def test_dtypes(shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str) -> None:
    passes(shape, groups, dtype, layout=layout)


@pytest.mark.usefixtures("several_programs")
@BOTH
@pytest.mark.parametrize("mean", [1e4, -1e6])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 20, 9, 9), 2), ((1, 4, 120, 120), 2), ((2, 8, 6, 6), 8), ((2, 8, 16, 16), 2)]
)
def test_large_means(shape: tuple[int, ...], groups: int, mean: float, layout: str) -> None:
    passes(shape, groups, mean=mean, layout=layout)


@BOTH
@pytest.mark.parametrize("parameters", [FP16, BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_parameters_of_their_own_dtype(dtype: torch.dtype, parameters: torch.dtype, layout: str) -> None:
    passes((2, 12, 4, 4), 3, dtype, parameters=parameters, layout=layout)


@BOTH
@pytest.mark.parametrize("affine", ["", "w", "b"])
def test_without_parameters(affine: str, layout: str) -> None:
    passes((2, 12, 4, 4), 3, affine=affine, layout=layout)


ORDINARY = {
    "held": ((3, 12, 5, 5), 3, "contiguous"),
    "tiny": ((9, 16, 2, 2), 8, "contiguous"),
    "runs": ((1, 2, 160, 160), 1, "contiguous"),
    "channels_last": ((2, 40, 5, 5), 4, "channels_last"),
    "borders": ((2, 130, 4, 3), 2, "channels_last"),
    "instances": ((2, 12, 5, 5), 12, "channels_last"),
}
EVERY = pytest.mark.parametrize(("shape", "groups", "layout"), ORDINARY.values(), ids=ORDINARY.keys())


@EVERY
def test_writes_its_outputs_and_nothing_else(shape: tuple[int, ...], groups: int, layout: str) -> None:
    g = given(shape, groups, layout=layout)
    guards = [guarded(t) for t in (g.x, g.dy, g.weight, g.bias) if t is not None]
    x, dy, weight, bias = (h.tensor for h in guards)
    copies = [h.tensor.clone() for h in guards]
    with nan_filled_allocations():
        y, table, _ = kernels.group_norm(x, groups, weight, bias)
        *gradients, dz = kernels.group_norm_backward(x, dy, table, groups, weight)
    assert all(bit_identical(h.tensor, c) for h, c in zip(guards, copies, strict=True))
    assert all(h.intact() for h in guards)
    assert all(t is not None and t.isfinite().all() for t in (y, table, *gradients))
    assert dz is None


@pytest.mark.usefixtures("several_programs")
@EVERY
def test_same_bits_in_any_order(shape: tuple[int, ...], groups: int, layout: str) -> None:
    g = given(shape, groups, BF16, layout=layout)
    first = by_kernels(g)
    for seed in range(2):
        with shuffled(seed):
            again = by_kernels(g)
        assert all(bit_identical(a, b) for a, b in zip(again, first, strict=True))  # type: ignore[arg-type]


@EVERY
def test_only_what_is_wanted(shape: tuple[int, ...], groups: int, layout: str) -> None:
    g = given(shape, groups, layout=layout)
    full = by_kernels(g)[2:]
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        for value, want, expected in zip(by_kernels(g, wanted)[2:], wanted, full, strict=True):
            assert (value is not None) == want
            if value is not None:
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("cut", [1, 3])
def test_unaligned_storage(shape: tuple[int, ...], groups: int, layout: str, cut: int) -> None:
    """Tensors that start anywhere in their storage."""
    if len(shape) == 4 and shape[2] > 100:
        shape = (1, 2, 90, 90)  # a piece at a time: as many steps, each a fourth

    def moved(t: Tensor) -> Tensor:
        buffer = torch.full((t.numel() + cut,), float("nan"), dtype=t.dtype)
        return buffer[cut:].as_strided(t.shape, t.stride(), cut).copy_(t)

    g = given(shape, groups, layout=layout)
    x, dy, weight, bias = (moved(t) for t in (g.x, g.dy, g.weight, g.bias) if t is not None)
    y, table, _ = kernels.group_norm(x, groups, weight, bias)
    dx, dweight, dbias, _ = kernels.group_norm_backward(x, dy, table, groups, weight)
    assert dx is not None
    assert dweight is not None
    assert dbias is not None
    check(g, {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias})


@BOTH
@pytest.mark.parametrize("strides", ["expanded", "transposed", "sliced", "the other layout"])
def test_gradients_of_any_strides(strides: str, layout: str) -> None:
    g = given((3, 12, 6, 6), 3, layout=layout)
    if strides == "expanded":
        dy = torch.ones(()).expand(g.x.shape)
    elif strides == "transposed":
        dy = g.dy.transpose(2, 3).contiguous().transpose(2, 3)
    elif strides == "sliced":
        dy = torch.cat((g.dy, g.dy), 3)[..., ::2]
    else:
        other = torch.channels_last if layout == "contiguous" else torch.contiguous_format
        dy = g.dy.contiguous(memory_format=other)
    g = type(g)(g.x, dy, g.groups, g.weight, g.bias)
    check(g, run(group_norm, g))


@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_inputs_of_any_strides(strides: str) -> None:
    """Copied to contiguous ones."""
    g = given((3, 12, 6, 6), 3)
    x = g.x.transpose(2, 3) if strides == "transposed" else torch.cat((g.x, g.x), 3)[..., ::2]
    y = group_norm(x, 3, g.weight, g.bias)
    assert y.is_contiguous()
    assert bit_identical(y, group_norm(x.contiguous(), 3, g.weight, g.bias))


@BOTH
@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
def test_one_bad_value_stays_in_its_group(bad: float, layout: str) -> None:
    g = given((2, 12, 4, 4), 3, layout=layout)
    expected = run(group_norm, g)
    g.x[1, 5, 2, 2] = bad  # the second group's
    found = run(group_norm, g)
    elsewhere = torch.ones(2, 12, dtype=torch.bool)
    elsewhere[1, 4:8] = False
    for name in ("y", "dx"):
        assert found[name][1, 4:8].isnan().all(), name
        assert bit_identical(found[name][elsewhere], expected[name][elsewhere]), name


@BOTH
@pytest.mark.parametrize(("shape", "groups"), [((2, 8, 8, 8), 2), ((1, 2, 96, 96), 1)], ids=str)
@pytest.mark.parametrize("numbers", ["zeros first", "one spike", "a step", "tiny", "huge", "one value"])
def test_hostile_numbers(numbers: str, shape: tuple[int, ...], groups: int, layout: str) -> None:
    """What defeats a pivot taken from one place of a group, or sums of squares."""
    g = given(shape, groups, layout=layout, mean=1e4)
    if numbers == "zeros first":
        g.x[:, :, :2] = 0
    elif numbers == "one spike":
        g.x[:, 1, 3, 3] = 3e5
    elif numbers == "a step":
        g.x[:, shape[1] // 2 :] += 1e5
    elif numbers == "one value":
        g.x.fill_(3.7)
    else:
        g.x.copy_((g.x - 1e4) * (1e-15 if numbers == "tiny" else 1e15))
    expected = exact.group_norm(g.x, g.dy, groups, g.weight, g.bias, EPS)
    for name, value in run(group_norm, g).items():
        assert exact.excess(value, expected[name], FP32) <= 1, name
