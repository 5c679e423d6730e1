"""A reduction that stops at the moments: mean, M2 and count of each channel, against fp64."""

from __future__ import annotations

import pytest
import torch

from bnfast.kernels import batch_norm
from tests.support.buffers import bit_identical, nan_filled_allocations
from tests.support.layers import both_layouts, data

SHAPES = [(4, 16, 7, 7), (3, 5, 6, 6), (2, 3, 40, 41), (300, 24), (1, 1, 5000), (5, 3, 1, 1), (2, 8, 3, 4, 5)]


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("mean", [0.0, 1e4])
@both_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(shape: tuple[int, ...], last: bool, mean: float) -> None:
    x = data(*shape, last=last) + mean
    before = x.clone()
    with nan_filled_allocations():
        found = batch_norm.moments(x).double()
    assert bit_identical(x, before)
    channels = x.double().transpose(0, 1).flatten(1)
    expected = channels.mean(1)
    deviations = (channels - expected[:, None]).square().sum(1)
    n = channels.shape[1]
    assert (found[2] == n).all()
    torch.testing.assert_close(found[0], expected, rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(found[1], deviations, rtol=2e-6, atol=1e-9 * n)
