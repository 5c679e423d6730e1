"""Tensors of more than 2^31 elements: every offset that is kept in 32 bits anywhere is one that wraps here.

Truth is computed in fp64 by chunks, and so is the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast import exact, functional
from bnfast.checks import fp64, one_step
from bnfast.checks.cases import Case, Given, batch_renorm, given, group_norm, instance_norm, layer_norm
from tests.support.families import BF16, FP32, layouts
from tests.support.oracle import need_memory

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
BYTES = 2  # bf16
CHUNK = 1 << 26  # elements
GB = 1 << 30

# Each addressing of the kernels; the comment is how the plan calls it.
LARGE = [
    *layouts(Case((343_000, 128, 7, 7), BF16)),  # planes, and rows
    *layouts(Case((43, 3, 4096, 4096), BF16)),  # runs, and cycles
    Case((3, 1, 715_827_888), BF16),  # one channel
    Case((1, 1, (1 << 31) + 4096), BF16),  # one run
    Case((343_000, 128, 7, 7), BF16, training=False),
    *layouts(batch_renorm((343_000, 128, 7, 7), BF16)),
    group_norm((8200, 64, 64, 64), BF16, groups=16),  # a program holds 32 KB of x, and of x and dy
    group_norm((8200, 64, 64, 64), BF16, groups=8),  # 64 KB of x alone
    group_norm((4, 128, 2100, 2100), BF16, groups=32),  # runs
    group_norm((1, 128, 4096, 4100), BF16, groups=1),  # one run
    group_norm((400, 320, 128, 132), BF16, True, groups=32),  # rows
    group_norm((43, 3, 4096, 4096), BF16, True, groups=1),  # cycles
    instance_norm((343_000, 128, 7, 7), BF16),  # many groups a program
    instance_norm((9, 128, 125, 125, 125), BF16, True),
]


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
        t = torch.empty((n, *space, c), dtype=case.dtype, device=CUDA).movedim(-1, 1)
    else:
        t = torch.empty(case.shape, dtype=case.dtype, device=CUDA)
    generator = torch.Generator(CUDA).manual_seed(seed)
    # Every channel and every sample has its own mean, and so has every chunk: wrong addresses then show in
    # the statistics too.
    by_channel, by_sample = (torch.linspace(-1, 1, size, device=CUDA) for size in (c, n))
    own = (by_channel + by_sample[:, None] + mean)[..., None].expand(n, c, prod(space))
    for k, (piece, level) in enumerate(chunks(case, t, own)):
        noise = torch.randn(piece.shape, generator=generator, device=CUDA)
        piece.copy_(noise + level + k % 7 / 7)
    return t


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_more_elements_than_32_bits_count(case: Case) -> None:
    elements = prod(case.shape)
    assert elements > 1 << 31
    # x, dy, y and dx, a dozen chunks in fp64, and what is known of each channel of each sample
    known = 24 * prod(case.shape[:2]) if case.in_sample else 0
    need_memory(4 * elements * BYTES + 12 * CHUNK * 8 + known * 8 + 4 * GB)
    tiny = given(Case((2, *case.shape[1:2]), FP32, mean=1.0), CUDA)
    tensors = replace(tiny, x=filled(case, 1, 1.0), dy=filled(case, 2, 0.0))
    normal, vectors = fp64.of(case, tensors, lambda: chunks(case, tensors.x, tensors.dy))
    ours = one_step.run(case, bnfast, tensors)

    for x, dy, y, dx in chunks(case, tensors.x, tensors.dy, ours["y"], ours["dx"]):
        assert exact.error_ratio(y, normal.y(x), FP32) <= 1
        assert exact.error_ratio(dx, normal.dx(x, dy), FP32) <= 1
    for name, value in vectors.items():
        assert exact.error_ratio(ours[name], value, FP32) <= 1, name
    if case.tracked:
        assert ours["num_batches_tracked"].item() == case.batches + case.training


@pytest.mark.parametrize(("rows", "width"), [(2_900_000, 768), (135_000, 16384), (2, 1 << 29)], ids=str)
def test_rows_of_more_elements_than_32_bits_count(rows: int, width: int) -> None:
    """Rows of the beginning, the middle and the end, compared one by one with fp64."""
    assert rows * width > 1 << 31 or width == 1 << 29
    need_memory(6 * rows * width * BYTES + 8 * GB)
    x = torch.empty(rows, width, dtype=BF16, device=CUDA).normal_()
    dy = torch.empty_like(x).normal_()
    x.requires_grad_()
    y = functional.layer_norm(x, (width,))
    (dx,) = torch.autograd.grad(y, x, dy)
    case, empty = layer_norm((1, width), BF16, affine=False), dx.new_empty(0)
    for row in {0, 1, rows // 2, (1 << 31) // width % rows, rows - 1}:
        x_row, dy_row, y_row, dx_row = (t.detach()[row : row + 1] for t in (x, dy, y, dx))
        tensors = Given(x_row, dy_row, None, None, empty, empty)
        verdicts = fp64.judge(case, tensors, {"y": y_row, "dx": dx_row})
        assert all(verdict.ok for verdict in verdicts.values()), row
