"""Tensors of more than 2^31 elements: every offset that is kept in 32 bits anywhere is one that wraps here.

Truth is computed in fp64 by chunks, and so is the comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import prod

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast.checks import one_step, truth
from bnfast.checks.cases import Case, Given, batch_renorm, group_norm, instance_norm
from tests.gpu import parity

pytestmark = pytest.mark.gpu

BYTES = 2  # bf16
CHUNK = 1 << 26  # elements
GB = 1 << 30

# Each addressing of the kernels; the comment is how the plan calls it.
LARGE = [
    Case((343_000, 128, 7, 7), torch.bfloat16),  # planes
    Case((343_000, 128, 7, 7), torch.bfloat16, channels_last=True),  # rows
    Case((43, 3, 4096, 4096), torch.bfloat16),  # runs
    Case((43, 3, 4096, 4096), torch.bfloat16, channels_last=True),  # cycles
    Case((3, 1, 715_827_888), torch.bfloat16),  # one channel
    Case((1, 1, (1 << 31) + 4096), torch.bfloat16),  # one run
    Case((343_000, 128, 7, 7), torch.bfloat16, training=False),
    batch_renorm((343_000, 128, 7, 7), torch.bfloat16),
    batch_renorm((343_000, 128, 7, 7), torch.bfloat16, True),
    group_norm((8200, 64, 64, 64), torch.bfloat16, groups=16),  # a program holds 32 KB of x, and of x and dy
    group_norm((8200, 64, 64, 64), torch.bfloat16, groups=8),  # 64 KB of x alone
    group_norm((4, 128, 2100, 2100), torch.bfloat16, groups=32),  # runs
    group_norm((1, 128, 4096, 4100), torch.bfloat16, groups=1),  # one run
    group_norm((400, 320, 128, 132), torch.bfloat16, True, groups=32),  # rows
    group_norm((43, 3, 4096, 4096), torch.bfloat16, True, groups=1),  # cycles
    instance_norm((343_000, 128, 7, 7), torch.bfloat16),  # many cells a program
    instance_norm((9, 128, 125, 125, 125), torch.bfloat16, True),
]


def need_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * GB:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, and {free / GB:.0f} are free")


def chunks(case: Case, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of [N, C, S] pieces, the same ones of each tensor. Each holds a part of all that has statistics
    of its own: of every sample, where samples have."""
    n, c = case.shape[:2]
    s = prod(case.shape[2:])
    tensors = tuple(t.view(n, c, s) for t in tensors)  # whichever the layout
    together = n if case.in_sample else 1
    positions = max(1, min(s, CHUNK // (c * together)))
    samples = max(together, CHUNK // (c * positions))
    for i in range(0, n, samples):
        for j in range(0, s, positions):
            yield tuple(t[i : i + samples, :, j : j + positions] for t in tensors)


def filled(case: Case, seed: int, mean: float) -> Tensor:
    """Random numbers, made a chunk at a time, in the case's memory order."""
    n, c, *space = case.shape
    if case.channels_last:
        t = torch.empty((n, *space, c), dtype=case.dtype, device=parity.device()).movedim(-1, 1)
    else:
        t = torch.empty(case.shape, dtype=case.dtype, device=parity.device())
    generator = torch.Generator(parity.device()).manual_seed(seed)
    # Every channel and every sample has its own mean, and so has every chunk: wrong addresses then show in
    # the statistics too.
    by_channel, by_sample = (torch.linspace(-1, 1, size, device=parity.device()) for size in (c, n))
    own = (by_channel + by_sample[:, None] + mean)[..., None].expand(n, c, prod(space))
    for k, (piece, level) in enumerate(chunks(case, t, own)):
        noise = torch.randn(piece.shape, generator=generator, device=parity.device())
        piece.copy_(noise + level + k % 7 / 7)
    return t


def given(case: Case) -> Given:
    tiny = parity.given(Case((2, *case.shape[1:2]), torch.float32, mean=1.0))
    return dataclasses.replace(tiny, x=filled(case, 1, 1.0), dy=filled(case, 2, 0.0))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_more_elements_than_32_bits_count(case: Case) -> None:
    elements = prod(case.shape)
    assert elements > 1 << 31
    # x, dy, y and dx, a dozen chunks in fp64, and what is known of each channel of each sample
    known = 24 * prod(case.shape[:2]) if case.in_sample else 0
    need_memory((4 * elements * BYTES + 12 * CHUNK * 8 + known * 8) / GB + 4)
    tensors = given(case)
    true = truth.of(case, tensors, lambda: chunks(case, tensors.x, tensors.dy))
    ours = one_step.run(case, bnfast, tensors)

    for x, dy, y, dx in chunks(case, tensors.x, tensors.dy, ours["y"], ours["dx"]):
        assert parity.excess(case, y, true.y(x)) <= 1
        assert parity.excess(case, dx, true.dx(x, dy)) <= 1
    for name, value in true.vectors.items():
        assert parity.excess(case, ours[name], value) <= 1, name
    if case.tracked:
        assert ours["num_batches_tracked"].item() == case.batches + case.training
