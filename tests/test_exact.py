"""The judge of the numerics: its truth is autograd's in fp64, and it sees what an error over the whole tensor
would hide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from bnfast import exact
from bnfast.checks import truth
from bnfast.checks.cases import Case, batch_renorm, given, group_norm, instance_norm, layer_norm

FP32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
EPS = 1e-3


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def assert_derivatives(true: exact.Exact, x: Tensor, dy: Tensor, function: Callable[..., Tensor]) -> None:
    """function(x, weight, bias) of true's own x, with parameters of [channels]."""
    leaves = [x, *(data(x.shape[1], seed=seed) for seed in (2, 3))]
    leaves = [t.clone().requires_grad_() for t in leaves]
    y = function(*leaves)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy)
    for (value, scale), expected in (
        (true.dweight(), dweight),
        (true.dbias(), dbias),
        (true.y(x), y.detach()),
        (true.dx(x, dy), dx),
    ):
        assert_close(value, expected)
        assert (scale > 0).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_batch_norm_is_autograds(chunks: int, training: bool) -> None:
    x, dy, weight, bias = data(6, 4, 3, 2), data(6, 4, 3, 2, seed=1), data(4, seed=2), data(4, seed=3)
    mean, variance = data(4, seed=4), data(4, seed=5).square() + 0.5
    fixed = None if training else (mean, variance)

    def pairs() -> list[tuple[Tensor, Tensor]]:
        return list(zip(x.chunk(chunks), dy.chunk(chunks), strict=True))

    true = exact.batch_norm(x, dy, weight, bias, EPS, fixed, pairs)
    running = mean.clone(), variance.clone()
    assert_derivatives(
        true, x, dy, lambda x, w, b: F.batch_norm(x, *running, w, b, training=training, momentum=0.3, eps=EPS)
    )
    if training:
        found = true.running(mean, variance, 0.3)
        assert_close(found["running_mean"][0], running[0])
        assert_close(found["running_var"][0], running[1])


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cells_may_be_groups_of_a_sample(groups: int, chunks: int) -> None:
    """GroupNorm, and InstanceNorm with as many groups as channels: mean and variance of each sample's group,
    parameters of each channel."""
    x, dy, weight, bias = data(3, 4, 5), data(3, 4, 5, seed=1), data(4, seed=2), data(4, seed=3)

    def pairs() -> list[tuple[Tensor, Tensor]]:
        return list(zip(x.chunk(chunks, 2), dy.chunk(chunks, 2), strict=True))

    true = exact.group_norm(x, dy, groups, weight, bias, EPS, pairs)
    assert_derivatives(true, x, dy, lambda x, w, b: F.group_norm(x, groups, w, b, EPS))


def largest(t: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(t.abs().argmax(), t.shape))


def zeroed_element(t: Tensor) -> Tensor:
    """Not the largest one, which anything sees, but one of usual size."""
    flat = t.clone().view(-1)
    flat[(flat.abs() - flat.abs().median()).abs().argmin()] = 0
    return flat.view_as(t)


def shifted_tile(t: Tensor) -> Tensor:
    """2048 elements of the neighbour's values, one place on."""
    flat = t.clone().view(-1)
    flat[4096 : 4096 + 2048] = t.view(-1)[4097 : 4097 + 2048]
    return flat.view_as(t)


SMALL = Case((8, 24, 7, 7))
LARGE = Case((64, 16, 32, 32), BF16)
DAMAGES: dict[str, tuple[Case, str, Callable[[Tensor], Tensor]]] = {
    "y 2 % too large, bf16": (replace(SMALL, dtype=BF16), "y", lambda t: t * 1.02),
    "one element of y is 0": (SMALL, "y", zeroed_element),
    "one element of y is 0, bf16": (LARGE, "y", zeroed_element),
    "one tile of y": (LARGE, "y", shifted_tile),
    "dx off by 1 %": (SMALL, "dx", lambda t: t * 1.01),
    "dx off by 1 %, bf16": (replace(SMALL, dtype=BF16), "dx", lambda t: t * 1.01),
    "one element of dx is 0": (SMALL, "dx", zeroed_element),
    "dweight off by 1e-3": (SMALL, "dweight", lambda t: t * 1.001),
    "dbias off by 1e-4": (SMALL, "dbias", lambda t: t * 1.0001),
    "one dweight of another channel": (SMALL, "dweight", lambda t: torch.cat((t[1:2], t[1:]))),
    "biased variance": (SMALL, "running_var", lambda t: t * (1 - 0.1 / 392)),
    "running mean off by 1e-5": (SMALL, "running_mean", lambda t: t * (1 + 1e-5)),
    "NaN in y": (SMALL, "y", lambda t: torch.where(t == t.max(), float("nan"), t)),
    "r left out of dweight": (batch_renorm((8, 24, 7, 7)), "dweight", lambda t: t * 0.999),
    "variance averaged, not sigma": (batch_renorm((8, 24, 7, 7)), "running_var", lambda t: t * 1.0001),
    "one element of a group": (group_norm((3, 30, 7, 7), groups=3), "dx", zeroed_element),
    "one sample's plane": (instance_norm((8, 24, 7, 7)), "y", zeroed_element),
    "one element of a row": (layer_norm((33, 100)), "dx", zeroed_element),
    "dbias of a neighbour": (layer_norm((33, 100)), "dbias", lambda t: t.roll(1)),
    "dy's fp32 rounded to bf16": (SMALL, "dx", lambda t: t.bfloat16().float()),
}


@pytest.mark.parametrize(("case", "name", "damage"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_seen(case: Case, name: str, damage: Callable[[Tensor], Tensor]) -> None:
    """In the true results, rounded once, of which nothing else is amiss."""
    tensors = given(case, CPU)
    expected = truth.expectations(case, tensors)
    wide = exact.accumulator(case.dtype)
    sound = {k: v.to(case.dtype if k in ("y", "dx") else wide) for k, (v, _) in expected.items()}
    if case.tracked:
        sound["num_batches_tracked"] = torch.tensor(case.batches + 1)
    assert all(verdict.ok for verdict in truth.judge(case, tensors, sound).values())
    verdicts = truth.judge(case, tensors, {**sound, name: damage(sound[name])})
    assert [k for k, verdict in verdicts.items() if not verdict.ok] == [name]


def test_a_bias_that_no_element_betrays() -> None:
    """Errors of half the allowed size pass one by one; all of one sign and in every element they do not."""
    expected = (torch.ones(1000, 1, dtype=torch.float64), torch.ones(1000, 1, dtype=torch.float64))
    value = torch.full((1000, 1), 1 + 4 * torch.finfo(FP32).eps)
    verdict = exact.judge(value, torch.ones(1000, 1), expected, FP32)
    assert verdict.share <= 1
    assert not verdict.ok


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_fp64_is_judged_by_sums_that_are_rounded_once(n: int) -> None:
    """torch's sums in fp64 are no better than a kernel's."""
    x = data(n, 3, 5) * 10 ** data(n, 3, 5, seed=1)
    true = exact.batch_norm(x, x, None, None, EPS)
    sums, _ = true.dbias()
    assert sums.tolist() == [math.fsum(x[:, c].flatten().tolist()) for c in range(3)]
