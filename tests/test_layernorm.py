"""LayerNorm's kernels against fp64, in the interpreter, and what they do to memory. Everything else about the
function and the layer is in test_layernorm_layer.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast.functional import layer_norm
from bnfast.kernels import row_plan
from tests.support import kernel_calls as kernels
from tests.support.buffers import bit_identical, guarded, nan_filled_allocations
from tests.support.cooperative import shuffled
from tests.support.row_oracle import check, given, run
from tests.support.trace import Trace, trace

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
WIDTHS = (1, 3, 7, 64, 100, 768, 1000, 4096, 5000)


def passes(shape: tuple[int, ...], dtype: torch.dtype, **options: object) -> None:
    g = given(shape, dtype, **options)  # type: ignore[arg-type]
    with nan_filled_allocations():
        ours = run(layer_norm, g)
    check(g, ours)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5])
def test_widths(rows: int, width: int) -> None:
    passes((rows, width), FP32)


# beyond the widths that are held: forward 56 or 64 KB (32 where loaded in singles), backward at most half
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 20000), FP32), ((3, 8201), FP32), ((2, 9000), FP32), ((2, 12296), BF16), ((2, 4100), FP64)],
    ids=str,
)
def test_long_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    size = row_plan.Rows(*shape, dtype.itemsize, True, 2)
    assert row_plan.forward(size)[0] == ("long" if shape[1] in (20000, 8201) else "held")
    assert row_plan.gradients(size) is None
    passes(shape, dtype)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP64], ids=str)
@pytest.mark.parametrize("shape", [(9, 7), (33, 64), (6, 100), (4, 768), (3, 1001), (2, 2560)], ids=str)
def test_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    passes(shape, dtype)


@pytest.mark.parametrize("shape", [(700, 3), (301, 64), (130, 100), (50, 768), (29, 1024)], ids=str)
def test_many_rows(shape: tuple[int, ...]) -> None:
    """More rows than a program takes at a time, and a number that does not divide evenly."""
    passes(shape, BF16)
    passes(shape, FP32)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_several_dimensions(dims: int) -> None:
    """dims 3: no batch dimension at all."""
    passes((5, 6, 10), FP32, dims=dims)


@pytest.mark.parametrize("parameters", [FP16, BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_parameters_of_their_own_dtype(dtype: torch.dtype, parameters: torch.dtype) -> None:
    passes((6, 72), dtype, parameters=parameters)


@pytest.mark.parametrize("affine", ["", "w", "b"])
@pytest.mark.parametrize("shape", [(6, 72), (2, 8201)], ids=str)
def test_without_parameters(shape: tuple[int, int], affine: str) -> None:
    passes(shape, FP32, affine=affine)


@pytest.mark.parametrize(
    ("shape", "dtype", "mean"),
    [((5, 7), FP32, 1e4), ((3, 768), FP32, 1e4), ((2, 5000), FP32, -1e4), ((2, 20000), FP32, 1e4)]
    + [((5, 100), FP64, 1e8), ((4, 768), FP16, 100.0), ((4, 768), BF16, 100.0)],
    ids=str,
)
def test_large_means(shape: tuple[int, int], dtype: torch.dtype, mean: float) -> None:
    passes(shape, dtype, mean=mean)


@pytest.mark.parametrize("width", [100, 1000, 8201])
@pytest.mark.parametrize("data", ["zeros first", "one spike", "a step", "tiny", "huge"])
def test_hostile_rows(data: str, width: int) -> None:
    """What defeats a pivot taken from one place of a row, or sums of squares."""
    g = given((2, width), FP32, mean=1e4)
    x = g.x
    if data == "zeros first":
        x[:, : width // 3] = 0
    elif data == "one spike":
        x[:, width // 2] = 3e5
    elif data == "a step":
        x[:, width // 2 :] += 1e5
    elif data == "tiny":
        x.copy_((x - 1e4) * 1e-15)
    else:
        x.copy_((x - 1e4) * 1e15)
    with nan_filled_allocations():
        ours = run(layer_norm, g)
    check(g, ours)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("width", [50, 8201])
def test_one_bad_value_stays_in_its_row(width: int, bad: float) -> None:
    g = given((3, width), FP32)
    expected = run(layer_norm, g)
    g.x[1, width // 2] = bad
    found = run(layer_norm, g)
    for name in ("y", "dx"):
        assert found[name][1].isnan().all(), name
        assert bit_identical(found[name][[0, 2]], expected[name][[0, 2]]), name


def test_constant_rows() -> None:
    """Variance 0: beta, and no gradient but through what the mean takes away."""
    x = torch.full((4, 48), 3.7, requires_grad=True)
    y = layer_norm(x, (48,), eps=1e-5)
    assert not y.any()
    y.sum().backward()
    assert (x.grad.abs() < 1e-3).all()


SHAPES = [(5, 7), (33, 64), (3, 1000), (9, 1024), (2, 8201)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_writes_its_outputs_and_nothing_else(shape: tuple[int, int]) -> None:
    g = given(shape, FP32)
    held = [guarded(t) for t in (g.x, g.dy, g.weight, g.bias)]  # type: ignore[arg-type]
    x, dy, weight, bias = (h.tensor for h in held)
    copies = [h.tensor.clone() for h in held]
    with nan_filled_allocations():
        y, table, _ = kernels.layer_norm(x, weight, bias)
        *gradients, dz = kernels.layer_norm_backward(x, dy, table, weight)
    assert all(bit_identical(h.tensor, c) for h, c in zip(held, copies, strict=True))
    assert all(h.intact() for h in held)
    assert all(t is not None and t.isfinite().all() for t in (y, table, *gradients))
    assert dz is None


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("shape", [(300, 64), (40, 1000), (6, 8201)], ids=str)
def test_same_bits_in_any_order(shape: tuple[int, int]) -> None:
    g = given(shape, BF16)

    def step() -> list[Tensor]:
        y, table, _ = kernels.layer_norm(g.x, g.weight, g.bias)
        dx, dweight, dbias, _ = kernels.layer_norm_backward(g.x, g.dy, table, g.weight)
        assert dx is not None
        assert dweight is not None
        assert dbias is not None
        return [y, table, dx, dweight, dbias]

    first = step()
    for seed in range(2):
        with shuffled(seed):
            assert all(bit_identical(a, b) for a, b in zip(step(), first, strict=True))


def clean(t: Trace, launches: int) -> None:
    assert not t.out_of_bounds, t.out_of_bounds
    assert not t.hazards, t.hazards
    assert t.launches == launches


HELD = [(70, 1, FP16), (50, 7, FP16), (300, 64, FP16), (9, 100, FP16), (7, 768, FP16), (2, 5000, FP32)]
LONG = [(2, 8201, FP32, 2.0), (2, 9000, FP32, 1.0), (2, 12296, FP16, 1.0)]
EVERY = [(*case, 1.0, 1.0) for case in HELD] + [(*case, 2.0) for case in LONG]


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize(("rows", "width", "dtype", "forward", "backward"), EVERY, ids=str)
def test_traffic(rows: int, width: int, dtype: torch.dtype, forward: float, backward: float) -> None:
    """Forward: one launch, x once where a row fits, y once. Backward: dy and x once, or twice where two of
    them do not fit, dx once; a launch more for merging, and one more for the second sweep."""
    g = given((rows, width), dtype)
    x, dy = g.x, g.dy
    with trace(x=x) as t:
        y, table, _ = kernels.layer_norm(x, g.weight, g.bias)
    clean(t, 1)
    assert (t["x"].reads, t["x"].writes, t.of(y).writes, t.of(y).reads) == (forward, 0.0, 1.0, 0.0)
    assert t.of(y).unique_written == t.of(y).size
    assert t.of(table).unique_written == t.of(table).size
    with trace(x=x, dy=dy) as b:
        dx, dweight, dbias, _ = kernels.layer_norm_backward(x, dy, table, g.weight)
    assert dx is not None
    assert dweight is not None
    assert dbias is not None
    clean(b, 2 if backward == 1.0 else 3)
    assert (b["x"].reads, b["dy"].reads, b.of(dx).writes) == (backward, backward, 1.0)
    for result in (dx, dweight, dbias):
        assert b.of(result).unique_written == b.of(result).size
    if width % 64 == 0:
        flows = [t["x"].read_efficiency, t.of(y).write_efficiency, b["dy"].read_efficiency]
        assert min(flows) >= 0.97


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize(("rows", "width"), [(300, 64), (7, 768), (2, 8201)], ids=str)
def test_only_what_is_wanted(rows: int, width: int) -> None:
    """Without a table where no backward follows; one sweep without dx; dbeta alone never reads x."""
    g = given((rows, width), FP32)
    y, table, _ = kernels.layer_norm(g.x, g.weight, g.bias)
    with trace(x=g.x) as t:
        again, none, _ = kernels.layer_norm(g.x, g.weight, g.bias, keep=False)
    clean(t, 1)
    assert none.numel() == 0
    assert bit_identical(again, y)
    full = kernels.layer_norm_backward(g.x, g.dy, table, g.weight)
    for wanted in ((True, None, None), (False, FP32, None), (False, None, FP32), (True, None, FP32)):
        with trace(x=g.x, dy=g.dy) as b:
            found = kernels.layer_norm_backward(g.x, g.dy, table, g.weight, wanted)
        need_dx = wanted[0]
        twice = need_dx and width == 8201
        sums = wanted[1] is not None or wanted[2] is not None
        clean(b, 1 + twice + sums)
        reads = 1.0 + twice
        assert (b["dy"].reads, b["x"].reads) == (reads, reads if need_dx or wanted[1] else 0.0)
        for value, want, expected in zip(found, (*wanted, None), full, strict=True):
            assert (value is not None) == bool(want)
            if value is not None:
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 3, 8], ids="cut {}".format)
def test_unaligned_storage(cut: int) -> None:
    """Tensors that start anywhere in their storage: the same traffic, no vector reaching outside."""
    g = given((5, 96), FP16)

    def moved(t: Tensor) -> Tensor:
        return torch.zeros(t.numel() + cut, dtype=t.dtype)[cut:].view(t.shape).copy_(t)

    x, dy = moved(g.x), moved(g.dy)
    weight, bias = moved(g.weight), moved(g.bias)  # type: ignore[arg-type]
    with trace(x=x, weight=weight) as t:
        y, table, _ = kernels.layer_norm(x, weight, bias)
    clean(t, 1)
    assert (t["x"].reads, t.of(y).writes) == (1.0, 1.0)
    dx, dweight, dbias, _ = kernels.layer_norm_backward(x, dy, table, weight)
    check(g, {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias})  # type: ignore[dict-item]


def test_too_large_for_32_bits() -> None:
    """Offsets within a group of rows, and grids, are counted in 32 bits; everything else in 64."""
    from bnfast.kernels.plan import TooLarge

    for rows, width in ((1, 2**30), (2**31, 768), (2**31 + 5, 1)):
        size = row_plan.Rows(rows, width, 2, True, 132)
        with pytest.raises(TooLarge):
            row_plan.forward(size)
    assert row_plan.forward(row_plan.Rows(2**24, 4096, 2, True, 132))[0] == "held"
    assert row_plan.gradients(row_plan.Rows(2**24, 4096, 2, True, 132)) is not None


@pytest.mark.parametrize("input", [None, [1.0, 2.0]], ids=str)
def test_input_that_is_no_tensor(input: Any) -> None:
    with pytest.raises(TypeError, match="must be Tensor"):
        bnfast.LayerNorm(2)(input)
