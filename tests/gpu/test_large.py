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
from tests.gpu import parity
from tests.gpu.parity import Case, Given

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
]


def need_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * GB:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, and {free / GB:.0f} are free")


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of [N, C, S] pieces, the same ones of each tensor."""
    n, c = tensors[0].shape[:2]
    tensors = tuple(t.view(n, c, -1) for t in tensors)  # whichever the layout
    s = tensors[0].shape[2]
    positions = min(s, CHUNK // c)
    samples = max(1, CHUNK // (c * positions))
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
    # Every channel has its own mean, and so has every chunk: wrong addresses then show in the statistics too.
    own = torch.linspace(-1, 1, c, device=parity.device()).view(1, -1, 1)
    for k, (piece,) in enumerate(chunks(t)):
        noise = torch.randn(piece.shape, generator=generator, device=parity.device())
        piece.copy_(noise + own + mean + k % 7 / 7)
    return t


def given(case: Case) -> Given:
    tiny = parity.given(Case((2, *case.shape[1:2]), torch.float32, mean=1.0))
    return dataclasses.replace(tiny, x=filled(case, 1, 1.0), dy=filled(case, 2, 0.0))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_more_elements_than_32_bits_count(case: Case) -> None:
    elements = prod(case.shape)
    assert elements > 1 << 31
    # x, dy, y and dx, and a dozen chunks in fp64
    need_memory((4 * elements * BYTES + 12 * CHUNK * 8) / GB + 4)
    tensors = given(case)
    exact = parity.truth(case, tensors, lambda: chunks(tensors.x, tensors.dy))
    ours = parity.run(case, bnfast, tensors)

    for x, dy, y, dx in chunks(tensors.x, tensors.dy, ours["y"], ours["dx"]):
        assert parity.excess(case, y, exact.y(x)) <= 1
        assert parity.excess(case, dx, exact.dx(x, dy)) <= 1
    expected = {"dweight": exact.dweight(), "dbias": exact.dbias()}
    if case.training:
        expected |= parity.running(case, tensors, exact)
    for name, value in expected.items():
        assert parity.excess(case, ours[name], value) <= 1, name
    assert ours["num_batches_tracked"].item() == (4 if case.training else 3)
