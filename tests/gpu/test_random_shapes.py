"""A hundred layers and inputs drawn at random, the same ones every time, against fp64."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from tests.gpu import parity
from tests.gpu.parity import Case

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


@pytest.mark.parametrize("case", [case(seed) for seed in range(100)], ids=lambda c: f"{c.seed}-{c}")
def test_random(case: Case) -> None:
    parity.check(case)
