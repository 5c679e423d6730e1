"""The judge of the numerics: what it expects is autograd's in fp64, and it sees errors that an average over
the whole tensor would hide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bnfast import exact
from bnfast.checks import fp64, one_step, reference_layers
from bnfast.checks.cases import Case, batch_renorm, given, group_norm, instance_norm, layer_norm
from tests.support.layers import data

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
CPU = torch.device("cpu")


TRUE = [
    Case((6, 4, 3, 2), FP64),
    Case((6, 4, 3, 2), FP64, training=False),
    batch_renorm((6, 4, 3, 2), FP64),
    *(group_norm((3, 4, 5), FP64, groups=groups) for groups in (1, 2, 4)),
    instance_norm((3, 4, 5), FP64, tracked=True),
    instance_norm((3, 4, 5), FP64, tracked=True, training=False),
    layer_norm((5, 6), FP64),
]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("case", TRUE, ids=str)
def test_fp64_is_autograds(case: Case, chunks: int) -> None:
    """It is computed from the whole, or from chunks: of the batch, or of the positions of all samples."""
    tensors = given(case, CPU)
    x, dy = tensors.x, tensors.dy
    dim = 2 if case.in_sample and case.batch else 0
    pairs = [*zip(x.chunk(chunks, dim), dy.chunk(chunks, dim), strict=True)]
    normal, vectors = fp64.of(case, tensors, None if chunks == 1 else lambda: pairs)
    found = {"y": normal.y(x), "dx": normal.dx(x, dy), **vectors}
    expected = one_step.run(case, reference_layers, tensors)
    assert found.keys() == expected.keys() - {"num_batches_tracked"}
    for name, (value, scale) in found.items():
        assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")
        assert (scale > 0).all()


def zeroed_element(t: Tensor) -> Tensor:
    """Not the largest one, which any check would notice, but one of usual size."""
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
    """In the true results, rounded once, which pass as they are."""
    tensors = given(case, CPU)
    expected = fp64.expectations(case, tensors)
    wide = exact.accumulator(case.dtype)
    sound = {k: v.to(case.dtype if k in ("y", "dx") else wide) for k, (v, _) in expected.items()}
    if case.tracked:
        sound["num_batches_tracked"] = torch.tensor(case.batches + 1)
    assert all(verdict.ok for verdict in fp64.judge(case, tensors, sound).values())
    verdicts = fp64.judge(case, tensors, {**sound, name: damage(sound[name])})
    assert [k for k, verdict in verdicts.items() if not verdict.ok] == [name]


def test_a_bias_that_no_element_shows() -> None:
    """Errors of half the allowed size pass one by one; all of one sign and in every element they do not."""
    expected = (torch.ones(1000, 1, dtype=torch.float64), torch.ones(1000, 1, dtype=torch.float64))
    value = torch.full((1000, 1), 1 + 4 * torch.finfo(FP32).eps)
    verdict = exact.judge(value, torch.ones(1000, 1), expected, FP32)
    assert verdict.share <= 1
    assert not verdict.ok
    assert exact.error_ratio(value + torch.finfo(FP32).eps, expected, FP32) > 1


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_fp64_is_judged_by_sums_that_are_rounded_once(n: int) -> None:
    """torch's sums in fp64 are no better than a kernel's."""
    x = data(n, 3, 5, dtype=FP64) * 10 ** data(n, 3, 5, dtype=FP64, seed=1)
    sums, _ = exact.batch_norm(x, x, None, None, 1e-3).dbias()
    assert sums.tolist() == [math.fsum(x[:, c].flatten().tolist()) for c in range(3)]
