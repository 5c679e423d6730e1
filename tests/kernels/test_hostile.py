"""Numbers on which a careless sum of squares loses everything, and groups of one value, which with eps=0
leave no variance to divide by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast import exact
from bnfast.checks import fp64, one_step, reference_layers
from bnfast.checks.cases import Case, Given, given, group_norm, instance_norm, layer_norm
from tests.support.buffers import nan_filled_allocations
from tests.support.families import FP32, layouts, on_gpu
from tests.support.layers import every_path
from tests.support.versions import EPS_0_IN_EVAL

pytestmark = pytest.mark.compiled

CPU = torch.device("cpu")


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
def test_hostile_numbers(numbers: str, case: Case, device: torch.device) -> None:
    """What defeats a pivot taken from one place of a group or of a row, or sums of squares."""
    g = given(case, device)
    HOSTILE[numbers](g.x)
    with nan_filled_allocations():
        found = one_step.run(case, bnfast, g)
    if case.layer == "LayerNorm" and numbers != "one value":
        bad = {name: str(v) for name, v in fp64.judge(case, g, found).items() if not v.ok}
        assert not bad, bad
    else:
        for name, value in fp64.expectations(case, g).items():
            assert exact.error_ratio(found[name], value, FP32) <= 1, name


# where a kernel might take its pivot from, or lose small squares beside a large one
TRAPS = {
    "none": lambda g: None,
    "first element 0": lambda g: g.x[:, :, 0, 0].zero_(),
    "first sample 0": lambda g: g.x[0].zero_(),
    "spike first": lambda g: g.x[:, :, 0, 0].fill_(3e4),
    "spike last": lambda g: g.x[-1, :, -1, -1].fill_(3e4),
    "running mean NaN": lambda g: g.running_mean.fill_(float("nan")),
}
FAR_BATCHES = layouts(
    *(
        Case(s, mean=1e4, momentum=1.0)
        for s in ((8, 24, 7, 7), (12, 16, 14, 14), (4, 3, 70, 66), (5, 7, 9, 9))
    )
)
FAR_ON_GPU = [
    *layouts(
        Case((32, 96, 14, 14), mean=1e4, momentum=1.0),
        group_norm((8, 96, 14, 14), mean=1e4, groups=8),
        instance_norm((8, 20, 15, 15), mean=1e4),
    ),
    group_norm((2, 6, 160, 150), mean=1e4, groups=2),
]


@pytest.mark.parametrize("case", [*FAR_BATCHES, *on_gpu(FAR_ON_GPU)], ids=str)
@pytest.mark.parametrize("trap", TRAPS)
def test_as_good_as_two_passes_at_a_large_mean(trap: str, case: Case, device: torch.device) -> None:
    """At mean 1e4 and std 1, fp32, the error is within twice that of fp64 with its mean rounded to fp32, plus
    2 ulp: none is lost to cancellation. Plus 8 in the interpreter, which adds one after another where a GPU
    adds in a tree, so that beside a spike's square small ones are lost."""
    g = given(case, device)
    TRAPS[trap](g)
    normal, _ = fp64.of(case, g)
    x, dy = normal.seen(g.x), normal.seen(g.dy)
    group, channel = ((2, 3, 4), (0, 3, 4)) if case.in_sample else ((0, 2, 3), (0, 2, 3))
    deviations, h = x - normal.mean.float().double(), dy * normal.weight
    xhat = deviations * normal.rstd
    means = h.mean(group, keepdim=True), (h * xhat).mean(group, keepdim=True)
    two_passes = {
        "y": normal.as_x(xhat * normal.weight + normal.bias),
        "dx": normal.as_x(normal.rstd * (h - means[0] - xhat * means[1])),
        "dweight": (dy * xhat).sum(channel).flatten(),
    }
    if case.tracked:
        two_passes["running_var"] = deviations.square().sum(group).flatten() / (normal.count - 1)
    found, expected = one_step.run(case, bnfast, g), fp64.expectations(case, g)

    def error(value: Tensor, name: str) -> float:
        exactly, _ = expected[name]
        return ((value.double() - exactly).norm() / exactly.norm()).item()

    ulps = 2 if device.type == "cuda" else 8
    for name, other in two_passes.items():
        assert error(found[name], name) <= 2 * error(other.float(), name) + ulps * torch.finfo(FP32).eps, name


# read in one pass and in two; in tiles and pieces
CONSTANT = {
    "one pass": ((2, 4, 3, 5), False),
    "two passes": ((2, 4, 3, 5), True),
    "long": ((1, 2, 1, 20993), False),
}


def constant(case: Case, value: float) -> tuple[Given, dict[str, Tensor]]:
    """A step without an eps, of which the first sample is constant. The other, if any, is an ordinary one.
    Its output is the bias, since the values are their mean, and their gradient is 0."""
    g = given(case, CPU)
    g.x[0] = value
    found = one_step.run(case, bnfast, g)
    assert torch.equal(found["y"][0], g.bias[:, None, None].expand_as(g.x[0]))
    assert not found["dx"][0].any()
    return g, found


@every_path
@pytest.mark.parametrize(
    ("reading", "value"),
    [("long", 2.5), *((name, v) for name in ("one pass", "two passes") for v in (0.0, 0.1, -1e4 / 3))],
)
def test_instance_norm_of_constant_groups(reading: str, value: float, path: str) -> None:
    """As torch's layer. weight has no gradient from them."""
    shape, last = CONSTANT[reading]
    case = instance_norm(shape, channels_last=last, eps=0.0)
    g, found = constant(case, value)
    torch.testing.assert_close(found, one_step.run(case, reference_layers, g), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("reading", CONSTANT)
def test_group_norm_of_constant_groups(reading: str, groups: int) -> None:
    """The kernels do as for InstanceNorm. (torch's GroupNorm gives NaN, or noise in channels_last.)"""
    shape, last = CONSTANT[reading]
    _, found = constant(group_norm(shape, channels_last=last, eps=0.0, groups=groups), 2.5)
    assert all(t.isfinite().all() for t in found.values())


@every_path
@pytest.mark.parametrize("last", [False, True])
def test_a_running_variance_of_0(last: bool, path: str) -> None:
    """In eval nothing finite comes of it (torch gives NaN on CPU, NaN or an infinity on CUDA)."""
    if path == "torch" and not EPS_0_IN_EVAL:
        pytest.skip("this PyTorch refuses eps=0 in eval")
    case = Case((2, 4, 3, 5), channels_last=last, training=False, eps=0.0)
    g = given(case, CPU)
    g.running_var[1] = 0.0
    y = one_step.run(case, bnfast, g)["y"]
    assert not y[:, 1].isfinite().any()
    assert y[:, [0, 2, 3]].isfinite().all()
