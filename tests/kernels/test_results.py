"""What the kernels owe whatever the norm: they write their outputs and nothing else, give the same bits in
any order of their programs, compute what is wanted, keep a bad value where it belongs, and stand numbers on
which a careless sum of squares loses everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast import exact
from bnfast.checks import one_step, truth
from bnfast.checks.cases import Case, Given, group_norm, instance_norm, layer_norm
from bnfast.checks.cases import given as tensors_of
from bnfast.functional import layer_norm as layer_norm_function
from tests.support import kernel_calls
from tests.support.buffers import bit_identical, guarded, nan_filled_allocations
from tests.support.families import BF16, FP32, layouts
from tests.support.layers import both_layouts
from tests.support.orders import shuffled

CPU = torch.device("cpu")
# every addressing: planes, odd sizes, runs in pieces; cells and rows that are held, and that are not
ORDINARY = [
    *layouts(
        Case((8, 24, 7, 7)), Case((6, 13, 3, 4)), Case((2, 3, 70, 66)), Case((1, 1, 4, 5), tracked=False)
    ),
    *layouts(Case((5, 13, 3, 4), tracked=False)),
    group_norm((3, 12, 5, 5), groups=3),
    group_norm((9, 16, 2, 2), groups=8),
    group_norm((1, 2, 160, 160), groups=1),
    group_norm((2, 40, 5, 5), FP32, True, groups=4),
    group_norm((2, 130, 4, 3), FP32, True, groups=2),
    instance_norm((2, 12, 5, 5), FP32, True),
    *map(layer_norm, ((5, 7), (33, 64), (3, 1000), (9, 1024), (2, 8201))),
]
every_case = pytest.mark.parametrize("case", ORDINARY, ids=str)


def given(case: Case) -> Given:
    return tensors_of(case, CPU)


def step(case: Case, g: Given, wanted: kernel_calls.Wanted = kernel_calls.ALL) -> dict[str, Tensor]:
    return kernel_calls.step(case, g.x, g.dy, g.weight, g.bias, wanted)


@every_case
def test_writes_its_outputs_and_nothing_else(case: Case) -> None:
    """Inputs keep their bits (a known bug elsewhere: no running statistics -> the input overwritten); guards
    stay intact."""
    g = given(case)
    held = [guarded(t) for t in (g.x, g.dy, g.weight, g.bias) if t is not None]
    copies = [h.tensor.clone() for h in held]
    x, dy, weight, bias = (h.tensor for h in held)
    with nan_filled_allocations():
        found = kernel_calls.step(case, x, dy, weight, bias)
    assert all(bit_identical(h.tensor, c) for h, c in zip(held, copies, strict=True))
    assert all(h.intact() for h in held)
    assert all(t.isfinite().all() for t in found.values())


ORDERED = [
    *layouts(Case((16, 24, 7, 7)), Case((6, 13, 3, 4)), Case((2, 3, 70, 66))),
    *(case for case in ORDINARY if case.layer in ("GroupNorm", "InstanceNorm")),
    *(layer_norm(shape, BF16) for shape in ((300, 64), (40, 1000), (6, 8201))),
]


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_same_bits_in_any_order(case: Case) -> None:
    """Whichever program arrives last, the partials are merged in the same order."""
    g = given(case)
    first = step(case, g)
    for seed in range(3 if case.layer == "BatchNorm" else 2):
        with shuffled(seed):
            again = step(case, g)
        for name, value in first.items():
            assert bit_identical(again[name], value), name


SUBSETS: list[kernel_calls.Wanted] = [
    (True, None, None), (False, FP32, None), (False, None, FP32), (True, None, FP32),
]  # fmt: skip


@pytest.mark.parametrize("case", [c for c in ORDINARY if c.layer != "LayerNorm"], ids=str)
def test_only_what_is_wanted(case: Case) -> None:
    """Of LayerNorm test_traffic_rows.py asks it, with what is read for it."""
    g = given(case)
    full = step(case, g)
    for wanted in SUBSETS:
        for name, value in step(case, g, wanted).items():
            torch.testing.assert_close(value, full[name], rtol=1e-5, atol=1e-5)


SPOILT = [
    *layouts(Case((6, 10, 5, 5)), group_norm((2, 12, 4, 4), groups=3)),
    layer_norm((3, 50)),
    layer_norm((3, 8201)),
]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("case", SPOILT, ids=str)
def test_one_bad_value_stays_where_it_belongs(case: Case, bad: float) -> None:
    """In its channel, in its sample's group, or in its row."""
    g = given(case)
    expected = step(case, g)
    spoilt = torch.zeros(case.shape, dtype=torch.bool)
    if case.layer == "LayerNorm":
        g.x[1, case.shape[1] // 2] = bad
        spoilt[1] = True
    else:
        g.x[1, 5, 2, 2] = bad
        spoilt[(slice(None), 5) if case.layer == "BatchNorm" else (1, slice(4, 8))] = True
    found = step(case, g)
    for name in ("y", "dx"):
        assert found[name][spoilt].isnan().all(), name
        assert bit_identical(found[name][~spoilt], expected[name][~spoilt]), name
    for name in set(found) & {"mean", "variance"}:
        others = torch.arange(case.channels) != 5
        assert bit_identical(found[name][others], expected[name][others])
        assert not found[name][5].isfinite()


def zeros_first(x: Tensor) -> None:
    (x[:, : x.shape[1] // 3] if x.dim() == 2 else x[:, :, :2]).zero_()


def one_spike(x: Tensor) -> None:
    x[(slice(None), x.shape[1] // 2, *[3] * (x.dim() - 2))] = 3e5


HOSTILE = {
    "zeros first": zeros_first,
    "one spike": one_spike,
    "a step": lambda x: x[:, x.shape[1] // 2 :].add_(1e5),
    "tiny": lambda x: x.sub_(1e4).mul_(1e-15),
    "huge": lambda x: x.sub_(1e4).mul_(1e15),
    "one value": lambda x: x.fill_(3.7),
}
FAR = [
    *layouts(group_norm((2, 8, 8, 8), groups=2, mean=1e4), group_norm((1, 2, 96, 96), groups=1, mean=1e4)),
    *(layer_norm((2, width), mean=1e4) for width in (100, 1000, 8201)),
]


@pytest.mark.parametrize("case", FAR, ids=str)
@pytest.mark.parametrize("numbers", HOSTILE)
def test_hostile_numbers(numbers: str, case: Case) -> None:
    """What defeats a pivot taken from one place of a group or of a row, or sums of squares."""
    g = given(case)
    HOSTILE[numbers](g.x)
    with nan_filled_allocations():
        found = one_step.run(case, bnfast, g)
    if case.layer == "LayerNorm" and numbers != "one value":
        bad = {name: str(v) for name, v in truth.judge(case, g, found).items() if not v.ok}
        assert not bad, bad
    else:
        for name, value in truth.expectations(case, g).items():
            assert exact.excess(found[name], value, FP32) <= 1, name


def test_constant_rows() -> None:
    """Variance 0: beta, and no gradient but through what the mean takes away."""
    x = torch.full((4, 48), 3.7, requires_grad=True)
    y = layer_norm_function(x, (48,), eps=1e-5)
    assert not y.any()
    y.sum().backward()
    assert (x.grad.abs() < 1e-3).all()


def hostile(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """fp32 data on which a careless sum of squares loses everything."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 1e4
    if name == "first element 0":
        x[0, :, 0, 0] = 0
    elif name == "first sample 0":
        x[0] = 0
    elif name == "one spike":
        x[-1, :, -1, -1] = 3e4
    elif name == "spike first":
        x[0, :, 0, 0] = 3e4
    return x


def two_pass(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """BatchNorm by two passes in fp32 with an fp32 mean: all that can be asked of fp32 statistics."""
    mean = x.double().mean((0, 2, 3), keepdim=True).float()
    d = x - mean
    var = (d.double() ** 2).mean((0, 2, 3), keepdim=True).float()
    rstd = torch.rsqrt(var + 1e-5)
    w = weight.view(1, -1, 1, 1)
    xhat, n = d * rstd, x.numel() // x.shape[1]
    db, dw = dy.double().sum((0, 2, 3)).float(), (dy * xhat).double().sum((0, 2, 3)).float()
    dx = w * rstd * (dy - db.view_as(w) / n - xhat * dw.view_as(w) / n)
    return {
        "y": xhat * w,
        "dx": dx,
        "dweight": dw,
        "dbias": db,
        "variance": d.double().pow(2).sum((0, 2, 3)) / (n - 1),
    }


def exactly(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    b64 = torch.zeros_like(w64, requires_grad=True)
    y = torch.nn.functional.batch_norm(x64, None, None, w64, b64, True, 0.1, 1e-5)
    y.backward(dy.double())
    variance = x64.detach().transpose(0, 1).flatten(1).var(1)
    return {"y": y, "dx": x64.grad, "dweight": w64.grad, "dbias": b64.grad, "variance": variance}


@both_layouts
@pytest.mark.parametrize("shape", [(8, 24, 7, 7), (12, 16, 14, 14), (4, 3, 70, 66), (5, 7, 9, 9)], ids=str)
@pytest.mark.parametrize(
    "data", ["mean 1e4", "first element 0", "first sample 0", "one spike", "spike first", "running mean NaN"]
)
def test_batch_norm_of_hostile_numbers(data: str, shape: tuple[int, ...], last: bool) -> None:
    """Within twice the error of a two-pass computation with an fp32 mean, forward and backward, plus 8 ulp:
    the interpreter adds one after another where a GPU adds in a tree, so that beside a spike's square small
    ones are lost here."""
    x = hostile(data, shape)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight = torch.rand(shape[1], generator=torch.Generator().manual_seed(3)) + 0.5
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    mean = torch.full((shape[1],), float("nan") if data == "running mean NaN" else 0.0)
    variance = torch.zeros(shape[1])
    y, table, _ = kernel_calls.batch_norm_train(x, weight, None, mean, variance, momentum=1.0)
    dx, dweight, dbias, _ = kernel_calls.batch_norm_backward(x, dy, table)
    ours = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "variance": variance}
    exact, other = exactly(x, dy, weight), two_pass(x, dy, weight)
    for name, value in exact.items():
        scale = value.detach().norm()
        mine = (ours[name].double() - value.detach()).norm() / scale
        allowed = (
            2 * (other[name].double() - value.detach()).norm() / scale + 8 * torch.finfo(torch.float32).eps
        )
        assert mine <= allowed, (name, mine.item(), allowed.item())
