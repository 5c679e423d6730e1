"""Buffers give away a kernel that writes too little or too much."""

from __future__ import annotations

import pytest
import torch

from tests.support import toys
from tests.support.buffers import GUARD, bit_identical, guarded, nan_filled_allocations, shifted


def copied(x: torch.Tensor, fault: str = "", block: int = 64) -> torch.Tensor:
    y = torch.empty_like(x)
    toys.copy[(-(-x.numel() // block),)](x, y, x.numel(), BLOCK=block, FAULT=fault)
    return y


class TestBuffers:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32", "uint8"])
    def test_what_is_never_written_is_seen(self, dtype):
        x = torch.ones(128, dtype=getattr(torch, dtype))
        with nan_filled_allocations():
            whole, half = copied(x), copied(x, "half")
        assert bit_identical(whole, x)
        assert bit_identical(half[:64], x[:64])
        assert (half[64:] != half[64:]).all() if half.is_floating_point() else (half[64:] > 100).all()

    def test_every_allocator_is_poisoned_and_restored(self):
        before, x = torch.empty, torch.zeros(3, requires_grad=True)
        with nan_filled_allocations():
            fresh = [torch.empty(3), torch.empty_like(x), torch.empty_strided((3,), (2,)), x.new_empty(3)]
            fresh.append(x.new_empty_strided((3,), (2,)))
        assert all(tensor.isnan().all() for tensor in fresh)
        assert torch.empty is before

    @pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 4), (0, 3)])
    def test_guards_see_one_byte_at_either_end(self, shape):
        """The copy between them has the strides and values of what was copied, and they are NaN to whoever
        reads them."""
        x = torch.randn(shape)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        for position in (None, 0, GUARD - 1, -GUARD, -1):
            source = x if position is None else shifted(x, 1)
            held = guarded(source)
            assert bit_identical(held.tensor, x)
            assert held.tensor.stride() == x.stride()
            assert held.tensor.data_ptr() % 16 == source.data_ptr() % 16
            if position is not None:
                held.buffer[position] = 0
            assert held.intact() is (position is None)
        held = guarded(x)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert held.before.view(dtype).isnan().all()

    def test_guards_see_an_overrun(self):
        x, y = guarded(torch.randn(100)), guarded(torch.randn(100))
        toys.copy[(2,)](x.tensor, y.tensor, 100, BLOCK=64, FAULT="overrun")
        assert torch.equal(x.tensor, y.tensor)
        assert (x.intact(), y.intact()) == (True, False)

    def test_bits(self):
        nan, zero, x = torch.tensor([float("nan")]), torch.zeros(1), torch.randn(2, 3)
        for same in (nan.clone(), nan), (zero, zero), (x.t(), x.t().contiguous()):
            assert bit_identical(*same)
        for other in (-zero, zero.double(), torch.zeros(1, 1), torch.full((1,), 1e-45)):
            assert not bit_identical(zero, other)
