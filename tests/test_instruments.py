"""The instruments that watch interpreted kernels catch what they are for, and nothing else."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import toys
from tests.support.buffers import GUARD, bit_identical, guarded, nan_filled_allocations, shifted
from tests.support.orders import shuffled
from tests.support.trace import Hazard, trace


def copied(x: torch.Tensor, fault: str = "", block: int = 64) -> torch.Tensor:
    y = torch.empty_like(x)
    toys.copy[(-(-x.numel() // block),)](x, y, x.numel(), BLOCK=block, FAULT=fault)
    return y


def counter() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32)


class TestTraffic:
    def test_a_copy_reads_and_writes_once(self):
        x = torch.randn(200, dtype=torch.float16)
        with trace(x=x) as t:
            y = copied(x)
        copied(x)  # the hooks are gone
        assert torch.equal(x, y)
        assert (t.launches, t["x"].reads, t["x"].writes, t.of(y).reads, t.of(y).writes) == (1, 1, 0, 0, 1)
        assert t["x"].unique_read == t.of(y).unique_written == t["x"].size == 400
        assert t["x"].read_efficiency == t.of(y).write_efficiency == 400 / 416
        assert not t.out_of_bounds
        assert not t.hazards
        assert t["y"] is t.of(y[7:])
        with pytest.raises(KeyError):
            t.of(torch.empty(4))

    @pytest.mark.parametrize(
        ("x", "options", "read", "efficiency", "written"),
        [
            (torch.randn(128), {"FAULT": "half"}, 4 * 128, 1, 0.5),
            (torch.randn(512), {"STRIDE": 4}, 4 * 128, 0.25, 1),
            (torch.ones(1).expand(128), {"STRIDE": 0}, 4, 0.125, 1),  # counts in its logical size
        ],
        ids=["half is written", "stride", "expanded"],
    )
    def test_other_copies(self, x, options, read, efficiency, written):
        y = torch.empty(128)
        with trace(x=x, y=y) as t:
            toys.copy[(2,)](x, y, 128, BLOCK=64, **options)
        assert (t["x"].unique_read, t["x"].read_efficiency) == (read, efficiency)
        assert t["x"].reads == (1 if x.stride() == (0,) else 128 / len(x))
        assert (t["y"].writes, t["y"].unique_written, t["y"].write_efficiency) == (written, written * 512, 1)

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


class TestOutOfBounds:
    @pytest.mark.parametrize("traced", [True, False], ids=["traced", "guards alone"])
    def test_an_overrun(self, traced):
        """A trace reports it, and does not let it happen; without one, guards tell of it."""
        x, y = guarded(torch.randn(100)), guarded(torch.randn(100))

        def overrun() -> None:
            toys.copy[(2,)](x.tensor, y.tensor, 100, BLOCK=64, FAULT="overrun")

        if traced:
            with trace(x=x.tensor, y=y.tensor) as t:
                overrun()
            found = [(s.access, s.lanes, s.nearest) for s in t.out_of_bounds]
            assert found == [("load", 28, "x +400"), ("store", 28, "y +400")]
            assert (t.out_of_bounds[0].kernel, t.out_of_bounds[0].program) == ("copy", (1, 0, 0))
        else:
            overrun()
        assert torch.equal(x.tensor, y.tensor)
        assert (x.intact(), y.intact()) == (True, traced)


class TestHazards:
    @pytest.mark.parametrize(
        "fault", [{}, {"BARRIER": False}, {"SEM": "relaxed"}, {"SEM": "release"}, {"SEM": "acquire"}]
    )
    def test_a_merge_by_the_last_program(self, fault):
        """It is clean, and races without proper synchronisation."""
        x, y, partials = torch.randn(16, 32), torch.empty(32), torch.empty(4, 32)
        options = {"BLOCK": 32, "BARRIER": True, "SEM": "acq_rel", **fault}
        with trace() as t:
            toys.sum_last_done[(4,)](x, partials, counter(), y, 4, **options)
        assert torch.allclose(y, x.sum(0), atol=1e-5)
        assert (Hazard("sum_last_done", 1, "partials", "load/store") in t.hazards) is bool(fault)
        assert bool(t.hazards) is bool(fault)
        assert t["counter"].atomics == 4
        assert t["partials"].reads == t["partials"].writes == 1

    @pytest.mark.parametrize(
        ("programs", "lanes", "race"), [(3, 1, "store/store"), (1, 2, "lanes")], ids=["programs", "lanes"]
    )
    def test_two_stores_to_the_same_bytes(self, programs, lanes, race):
        y = torch.empty(32, dtype=torch.int32)
        with trace(y=y) as t:
            toys.store_colliding[(programs,)](y, BLOCK=32, LANES=lanes)
        assert t.hazards == [Hazard("store_colliding", 1, "y", race)]

    def test_launches_are_ordered_and_all_count(self):
        x, y = torch.randn(128), torch.empty(128)
        with trace(x=x, y=y) as t:
            for block in (64, 32):  # other programs store the same bytes
                toys.copy[(128 // block,)](x, y, 128, BLOCK=block)
        assert not t.hazards
        assert t.launches == t["x"].reads == t["y"].writes == 2
        assert t["x"].unique_read == t["y"].unique_written == 512

    @pytest.mark.parametrize("seed", range(4))
    def test_a_store_to_what_others_read_races_in_any_order(self, seed):
        step = counter()
        with trace(step=step) as t, shuffled(seed):
            toys.advance_step[(4,)](step, torch.empty(4, dtype=torch.int32))
        assert {h.race for h in t.hazards} <= {"load/store", "store/load"}
        assert t.hazards


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

    def test_bits(self):
        nan, zero, x = torch.tensor([float("nan")]), torch.zeros(1), torch.randn(2, 3)
        for same in (nan.clone(), nan), (zero, zero), (x.t(), x.t().contiguous()):
            assert bit_identical(*same)
        for other in (-zero, zero.double(), torch.zeros(1, 1), torch.full((1,), 1e-45)):
            assert not bit_identical(zero, other)


class TestOrders:
    def test_a_float_sum_by_atomics_depends_on_the_order(self):
        x, sums = torch.randn(64), set()
        for seed in range(8):
            y = torch.zeros(1)
            with shuffled(seed):
                toys.sum_by_atomics[(64,)](x, y)
            sums.add(y.item())
        assert len(sums) > 1

    @pytest.mark.parametrize("grid", [(5,), (2, 3), lambda _: (2, 1, 3), (0,)])
    def test_every_program_runs_once(self, grid: Any):
        count = torch.zeros(6)
        with shuffled(0):
            toys.count_programs[grid](count)
        programs = torch.tensor(grid(None) if callable(grid) else grid).prod()
        assert count.tolist() == [1.0] * programs + [0.0] * (6 - programs)
