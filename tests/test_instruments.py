"""The instruments that watch interpreted kernels catch what they are for, and nothing else."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from tests.support import toys
from tests.support.buffers import GUARD, bit_identical, guarded, nan_filled_allocations, shifted
from tests.support.orders import shuffled
from tests.support.trace import Hazard, trace


def copied(x: torch.Tensor, kernel=toys.copy, block: int = 64) -> torch.Tensor:
    y = torch.empty_like(x)
    kernel[(-(-x.numel() // block),)](x, y, x.numel(), BLOCK=block)
    return y


def column_sums(
    x: torch.Tensor, barrier: bool = True, sem: str = "acq_rel", programs: int = 4
) -> torch.Tensor:
    partials, y = torch.empty(programs, x.shape[1]), torch.empty(x.shape[1])
    counter = torch.zeros(1, dtype=torch.int32)
    rows = x.shape[0] // programs
    toys.sum_last_done[(programs,)](x, partials, counter, y, rows, BLOCK=x.shape[1], BARRIER=barrier, SEM=sem)
    assert counter.item() == 0
    return y


class TestTraffic:
    def test_a_copy_reads_and_writes_once(self):
        x = torch.randn(200, dtype=torch.float16)
        with trace(x=x) as t:
            y = copied(x)
        assert torch.equal(x, y)
        assert (t.launches, t["x"].reads, t["x"].writes, t.of(y).reads, t.of(y).writes) == (1, 1, 0, 0, 1)
        assert t["x"].unique_read == t.of(y).unique_written == t["x"].size == 400
        assert t["x"].read_efficiency == t.of(y).write_efficiency == 400 / 416
        assert not t.out_of_bounds
        assert not t.hazards
        assert t["y"] is t.of(y[7:])

    def test_a_second_read_counts(self):
        x = torch.randn(96)
        y = torch.empty_like(x)
        with trace(x=x, y=y) as t:
            toys.centre[(1,)](x, y, 96, BLOCK=32)
            toys.centre[(1,)](x, y, 96, BLOCK=32)
        assert t.launches == 2
        assert (t["x"].reads, t["x"].unique_read) == (4, 96 * 4)
        assert (t["y"].writes, t["y"].unique_written) == (2, 96 * 4)

    def test_a_partial_write_shows(self):
        x = torch.randn(128)
        with trace() as t:
            y = copied(x, toys.copy_lower_half)
        assert t.of(y).writes == 0.5
        assert t.of(y).unique_written == t.of(y).size // 2

    def test_stride_wastes_sectors(self):
        x, y = torch.randn(512), torch.empty(128)
        with trace(x=x) as t:
            toys.copy_strided[(2,)](x, y, 128, STRIDE=4, BLOCK=64)
        assert t["x"].read_efficiency == 0.25
        assert t.of(y).write_efficiency == 1

    def test_expanded_tensor_counts_in_its_logical_size(self):
        x = torch.ones(1).expand(64)
        with trace(x=x) as t:
            toys.copy_strided[(1,)](x, torch.empty(64), 64, STRIDE=0, BLOCK=64)
        assert t["x"].reads == 1
        assert t["x"].unique_read == 4

    def test_views_are_told_apart_and_overlaps_refused(self):
        base = torch.zeros(128)
        with trace(low=base[:64], high=base[64:], alias=base[:64]) as t:
            toys.copy[(1,)](base[:64], base[64:], 64, BLOCK=64)
        assert (t["low"].reads, t["low"].writes, t["high"].reads, t["high"].writes) == (1, 0, 0, 1)
        assert t["alias"] is t["low"]
        with pytest.raises(ValueError, match="overlaps"), trace(a=base[:65], b=base[64:]):
            pass

    def test_memory_is_held_so_that_no_later_tensor_gets_its_address(self):
        array = np.zeros(64, np.float32)
        held = weakref.ref(array)
        with trace() as t:
            t.adopt("x", torch.from_numpy(array))
            del array
            assert held() is not None

    def test_tracing_leaves_gradients_where_they_are(self):
        class Copy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return copied(x)

            @staticmethod
            def backward(ctx, dy):
                return copied(dy)

        x, dy = torch.randn(64, requires_grad=True), torch.randn(64)
        with trace(dy=dy) as t:
            Copy.apply(x).backward(dy)
        assert t.of(x.grad).writes == t["dy"].reads == 1

    def test_unknown_tensor_has_no_traffic(self):
        with trace() as t, pytest.raises(KeyError):
            t.of(torch.empty(4))

    def test_hooks_are_removed(self):
        with trace() as t:
            copied(torch.randn(64))
        copied(torch.randn(64))
        assert t.launches == 1


class TestOutOfBounds:
    def test_overrun_is_reported_and_not_carried_out(self):
        x, y = guarded(torch.randn(100)), guarded(torch.randn(100))
        with trace(x=x.tensor, y=y.tensor) as t:
            toys.copy_unmasked[(2,)](x.tensor, y.tensor, 100, BLOCK=64)
        assert [(s.access, s.lanes, s.nearest) for s in t.out_of_bounds] == [
            ("load", 28, "x +400"),
            ("store", 28, "y +400"),
        ]
        assert (t.out_of_bounds[0].kernel, t.out_of_bounds[0].program) == ("copy_unmasked", (1, 0, 0))
        assert y.intact()
        assert torch.equal(x.tensor, y.tensor)

    def test_guards_catch_an_overrun_without_a_trace(self):
        x, y = guarded(torch.randn(100)), guarded(torch.empty(100))
        toys.copy_unmasked[(2,)](x.tensor, y.tensor, 100, BLOCK=64)
        assert x.intact()
        assert not y.intact()

    def test_a_read_of_a_guard_is_nan(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert guarded(torch.zeros(4)).before.view(dtype).isnan().all()


class TestHazards:
    def test_a_merge_by_the_last_program_is_clean(self):
        with trace() as t:
            column_sums(torch.randn(16, 32))
        assert not t.hazards
        assert t["counter"].atomics == 4
        assert t["partials"].reads == t["partials"].writes == 1

    @pytest.mark.parametrize(
        "fault", [{"barrier": False}, {"sem": "relaxed"}, {"sem": "release"}, {"sem": "acquire"}]
    )
    def test_a_merge_without_proper_synchronisation_races(self, fault):
        with trace() as t:
            column_sums(torch.randn(16, 32), **fault)
        assert Hazard("sum_last_done", 1, "partials", "load/store") in t.hazards

    def test_two_programs_storing_the_same_bytes(self):
        y = torch.empty(32, dtype=torch.int32)
        with trace(y=y) as t:
            toys.store_everywhere[(3,)](y, BLOCK=32)
        assert t.hazards == [Hazard("store_everywhere", 1, "y", "store/store")]

    def test_launches_are_ordered(self):
        x, y = torch.randn(128), torch.empty(128)
        with trace(y=y) as t:
            for block in (64, 32):  # other programs store the same bytes
                toys.copy[(128 // block,)](x, y, 128, BLOCK=block)
        assert not t.hazards
        assert t["y"].writes == 2

    def test_two_lanes_storing_the_same_bytes(self):
        y = torch.empty(16, dtype=torch.int32)
        with trace(y=y) as t:
            toys.store_colliding[(1,)](y, BLOCK=32)
        assert t.hazards == [Hazard("store_colliding", 1, "y", "lanes")]

    @pytest.mark.parametrize("seed", range(4))
    def test_a_store_to_what_others_read_races_in_any_order(self, seed):
        step = torch.zeros(1, dtype=torch.int32)
        with trace(step=step) as t, shuffled(seed):
            toys.advance_step[(4,)](step, torch.empty(4, dtype=torch.int32))
        assert {h.race for h in t.hazards} <= {"load/store", "store/load"}
        assert t.hazards


class TestBuffers:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32", "uint8"])
    def test_what_is_never_written_is_seen(self, dtype):
        x = torch.ones(128, dtype=getattr(torch, dtype))
        with nan_filled_allocations():
            whole, half = copied(x), copied(x, toys.copy_lower_half)
        assert bit_identical(whole, x)
        assert bit_identical(half[:64], x[:64])
        assert (half[64:] != half[64:]).all() if half.is_floating_point() else (half[64:] > 100).all()

    def test_every_allocator_is_poisoned_and_restored(self):
        before = torch.empty
        x = torch.zeros(3, requires_grad=True)
        with nan_filled_allocations():
            fresh = (
                torch.empty(3),
                torch.empty_like(x),
                torch.empty_strided((3,), (2,)),
                x.new_empty(3),
                x.new_empty_strided((3,), (2,)),
            )
        assert all(tensor.isnan().all() for tensor in fresh)
        assert torch.empty is before

    @pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 4), (0, 3)])
    def test_guarded_copies_strides_and_values(self, shape):
        x = torch.randn(shape)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        for tensor in (x, shifted(x, 1)):
            held = guarded(tensor)
            assert bit_identical(held.tensor, x)
            assert held.tensor.stride() == x.stride()
            assert held.tensor.data_ptr() % 16 == tensor.data_ptr() % 16
            assert held.intact()

    @pytest.mark.parametrize("position", [0, GUARD - 1, -GUARD, -1])
    def test_guards_see_one_byte_at_either_end(self, position):
        held = guarded(torch.randn(5))
        held.buffer[position] = 0
        assert not held.intact()

    def test_bits(self):
        nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
        assert bit_identical(nan, nan.clone())
        assert bit_identical(zero, zero)
        assert not bit_identical(zero, -zero)
        assert not bit_identical(zero, zero.double())
        assert not bit_identical(zero, torch.zeros(1, 1))
        assert not bit_identical(zero, torch.full((1,), 1e-45))
        x = torch.randn(2, 3)
        assert bit_identical(x.t(), x.t().contiguous())


class TestOrders:
    def test_last_program_done_gives_the_same_bits_in_any_order(self):
        x = torch.randn(64, 32)
        expected = column_sums(x, programs=16)
        assert torch.allclose(expected, x.sum(0), atol=1e-5)
        for seed in range(5):
            with shuffled(seed):
                assert bit_identical(column_sums(x, programs=16), expected)

    def test_a_float_sum_by_atomics_does_not(self):
        x, sums = torch.randn(64), set()
        for seed in range(8):
            y = torch.zeros(1)
            with shuffled(seed):
                toys.sum_by_atomics[(64,)](x, y)
            sums.add(y.item())
        assert len(sums) > 1

    @pytest.mark.parametrize("grid", [(5,), (2, 3), lambda _: (2, 1, 3), (0,)])
    def test_every_program_runs_once(self, grid):
        count = torch.zeros(6)
        with shuffled(0):
            toys.count_programs[grid](count)
        programs = torch.tensor(grid(None) if callable(grid) else grid).prod()
        assert count.tolist() == [1.0] * programs + [0.0] * (6 - programs)
