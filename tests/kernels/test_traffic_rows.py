"""What LayerNorm's kernels do to memory, counted in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnfast.checks import truth
from bnfast.checks.cases import given, layer_norm
from tests.support import kernel_calls as kernels
from tests.support.buffers import bit_identical
from tests.support.trace import clean, trace

CPU = torch.device("cpu")
FP16, FP32 = torch.float16, torch.float32


HELD = [(70, 1, FP16), (50, 7, FP16), (300, 64, FP16), (9, 100, FP16), (7, 768, FP16), (2, 5000, FP32)]
LONG = [(2, 8201, FP32, 2.0), (2, 9000, FP32, 1.0), (2, 12296, FP16, 1.0)]
EVERY = [(*case, 1.0, 1.0) for case in HELD] + [(*case, 2.0) for case in LONG]


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize(("rows", "width", "dtype", "forward", "backward"), EVERY, ids=str)
def test_traffic(rows: int, width: int, dtype: torch.dtype, forward: float, backward: float) -> None:
    """Forward: one launch, x once where a row fits, y once. Backward: dy and x once, or twice where two of
    them do not fit, dx once; a launch more for merging, and one more for the second sweep."""
    g = given(layer_norm((rows, width), dtype), CPU)
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
    g = given(layer_norm((rows, width)), CPU)
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
    case = layer_norm((5, 96), FP16)
    g = given(case, CPU)

    def moved(t: Tensor) -> Tensor:
        return torch.zeros(t.numel() + cut, dtype=t.dtype)[cut:].view(t.shape).copy_(t)

    x, dy = moved(g.x), moved(g.dy)
    weight, bias = moved(g.weight), moved(g.bias)  # type: ignore[arg-type]
    with trace(x=x, weight=weight) as t:
        y, table, _ = kernels.layer_norm(x, weight, bias)
    clean(t, 1)
    assert (t["x"].reads, t.of(y).writes) == (1.0, 1.0)
    dx, dweight, dbias, _ = kernels.layer_norm_backward(x, dy, table, weight)
    verdicts = truth.judge(case, g, {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias})
    assert all(verdict.ok for verdict in verdicts.values()), {n: str(v) for n, v in verdicts.items()}
