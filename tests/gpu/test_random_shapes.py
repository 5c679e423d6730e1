"""A hundred BatchNorms and sixty other layers, and their inputs, drawn at random, the same ones every time,
against fp64."""

from __future__ import annotations

import random
from dataclasses import replace
from math import prod

import pytest
import torch

from bnfast.checks.cases import Case
from tests.gpu import parity

pytestmark = pytest.mark.gpu

LARGEST = 2_000_000  # elements: enough for many programs a channel, and small enough for a hundred of them


def size(rng: random.Random, most: int) -> int:
    """Log-uniform, so that 1 and 2 are as likely as hundreds; now and then moved onto a power of two."""
    drawn = round(2 ** rng.uniform(0, most.bit_length() - 1))
    return 1 << (drawn.bit_length() - 1) if rng.random() < 0.25 else drawn


def shape(rng: random.Random, dims: int) -> tuple[int, ...]:
    while True:
        longest = {2: 0, 3: 4096, 4: 160, 5: 32}[dims]
        drawn = (size(rng, 512), size(rng, 1024), *(size(rng, longest) for _ in range(dims - 2)))
        if prod(drawn) <= LARGEST and prod(drawn) > drawn[1]:  # training takes two values a channel or more
            return drawn


def case(seed: int) -> Case:
    rng = random.Random(seed)
    dims = rng.choice((2, 3, 4, 4, 4, 5))
    dtype = rng.choice((torch.float16, torch.bfloat16, torch.float32, torch.float64))
    tracked = rng.random() < 0.85
    return Case(
        shape(rng, dims),
        dtype,
        channels_last=dims > 3 and rng.random() < 0.5,
        training=rng.random() < 0.75,
        mean=rng.choice((0.0, 0.5, -3.0, 30.0)),
        affine=rng.random() < 0.85,
        bias=rng.random() < 0.85,
        tracked=tracked,
        # torch.nn takes parameters in 16 bits only where the input has the same type
        parameters=dtype if rng.random() < 0.25 else None,
        momentum=rng.choice((0.1, 0.1, 0.9, None)) if tracked else 0.1,
        eps=rng.choice((1e-5, 1e-3)),
        storage=rng.choice(("dense", "dense", "dense", "offset", "sliced")),
        gradient=rng.choice(("dense", "dense", "dense", "expanded", "transposed", "offset")),
        seed=seed,
    )


def divisor(rng: random.Random, n: int) -> int:
    return rng.choice([d for d in range(1, n + 1) if n % d == 0])


def other_layer(seed: int) -> Case:
    """What BatchNorm's case of this seed becomes for another layer."""
    rng = random.Random(seed)
    layer = rng.choice(("GroupNorm", "GroupNorm", "InstanceNorm", "BatchRenorm"))
    drawn = replace(case(seed), layer=layer)
    if layer == "BatchRenorm":
        schedule = rng.choice((drawn.schedule, (3.0, 5.0, 9, 20, 20), (50.0, 50.0, 0, 0, 0)))
        return replace(drawn, tracked=True, schedule=schedule)
    n, c, *space = drawn.shape
    if layer == "GroupNorm":
        return replace(drawn, groups=divisor(rng, c), tracked=False)
    # InstanceNorm takes positions, and two values a channel of a sample or more
    return replace(drawn, shape=(n, c, *space[1:], 2)) if prod(space) == 1 else drawn


CASES = [*(case(seed) for seed in range(100)), *(other_layer(seed) for seed in range(1000, 1060))]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.seed}-{c}")
def test_random(case: Case) -> None:
    parity.check(case)
