"""The plan, from sizes alone: it covers x, fills the GPU, bounds the tail, and says no in time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfast.kernels import batch_plan, plan, row_plan
from bnfast.kernels.records import Problem

SMS = 132
RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14)]
counts = (st.integers(1, most) for most in (5000, 3000, 20000))
sizes = st.tuples(*counts, st.sampled_from([2, 4, 8]), st.booleans())


def passes(
    n: int, c: int, s: int, itemsize: int, channels_last: bool, aligned: bool, sms: int
) -> list[plan.PassPlan]:
    p = batch_plan.batch_norm(n, c, s, itemsize, channels_last or s == 1, sms, aligned)
    return [*p.forward, *p.backward]


@settings(max_examples=300, deadline=None)
@given(sizes, st.booleans(), st.sampled_from([1, 2, 20, 132, 160]))
def test_any_sizes_are_covered(size: tuple[int, int, int, int, bool], aligned: bool, sms: int) -> None:
    for planned in passes(*size, aligned, sms):
        view = planned.view
        assert 1 <= planned.splits <= planned.tiles  # a program without a tile would have no pivot
        tile, rows = planned.tile, planned.tile.tile_rows
        assert (planned.tiles - 1) * rows < view.rows <= planned.tiles * rows
        assert view.width <= view.lanes or view.mode == "nchw"
        assert view.mode != "nchw" or rows <= view.pieces
        assert view.pitch % tile.vec == view.width % tile.vec == 0
        assert tile.vec == 1 or aligned
        assert view.total == size[0] * size[1] * size[2]
        # the extents of tiles and grids are powers of two, as Triton wants them
        extents = [value for value in vars(tile).values() if isinstance(value, int)]
        assert all(extent & (extent - 1) == 0 for extent in extents)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("c", "hw"), RESNET50)
def test_large_shapes_fill_the_gpu(c: int, hw: int, channels_last: bool) -> None:
    p = batch_plan.batch_norm(256, c, hw * hw, 2, channels_last, SMS)
    for planned in (p.forward[0], p.backward[0]):
        assert planned.programs >= 0.75 * SMS
        if isinstance(planned, batch_plan.WholePlan):
            assert planned.tile.vec * 2 >= plan.VECTOR_BYTES / 2
            resident = min(planned.programs, SMS * planned.per_sm)
            assert planned.bytes_per_program * resident / SMS >= 47 * 1024
            continue
        assert planned.tile.vec * 2 == plan.VECTOR_BYTES
        # lanes without data carry no bytes: counted out, unlike in the static tests
        assert planned.bytes_per_program * planned.programs / SMS >= 47 * 1024
        # One SM reads this back alone, from L2, at about three times its share of DRAM's rate: under a
        # tenth of the pass.
        assert planned.tail_bytes <= 0.3 * p.x_bytes / SMS


# one channel, one sample, or little more
FEW = [(1, 1, 10**7), (10**6, 1, 1), (1, 32, 64**3), (1, 3, 10**6), (64, 1, 64**3), (64, 8, 102400)]


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(("n", "c", "s"), FEW)
def test_one_channel_or_one_sample_still_fills_the_gpu(n: int, c: int, s: int, channels_last: bool) -> None:
    """C programs would idle it. Of 2 MB, a program a tile is enough."""
    for planned in passes(n, c, s, 2, channels_last, True, SMS):
        assert planned.programs >= min(SMS, planned.tiles)


@pytest.mark.parametrize(
    ("n", "c", "s"), [(4, 64, 56 * 56), (32, 256, 14 * 14), (64, 512, 49), (1, 64, 3136)]
)
@pytest.mark.parametrize("inputs", [1, 2])
def test_few_programs_reduce_a_small_channels_last_tensor(n: int, c: int, s: int, inputs: int) -> None:
    """The last program merges what they leave in a few steps, and no program goes through many tiles."""
    planned = plan.plan_reduction(Problem(n, c, s, 2, True, True, SMS), inputs)
    steps = -(-planned.splits // planned.tile.partials_in_flight)
    assert steps <= 4
    assert planned.tiles <= 3 * planned.splits


def test_bytes_of_a_step() -> None:
    p = batch_plan.batch_norm(256, 64, 56 * 56, 2, True)
    assert p.x_bytes == 256 * 64 * 56 * 56 * 2
    assert 3 <= p.forward_bytes / p.x_bytes < 3.01
    assert 5 <= p.backward_bytes / p.x_bytes < 5.01


def test_more_than_2_to_the_31_elements() -> None:
    for n, c, s in ((1, 1, 2**31 + 4096), (2**15, 64, 2048), (3, 2**10, 2**20)):
        for planned in passes(n, c, s, 2, False, True, SMS):
            assert max(planned.geometry) < 2**31


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="too large"):
        _ = batch_plan.batch_norm(2, 2**31, 1, 2, True).forward[0].geometry


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("c", [1, 7])
def test_lanes_beyond_the_end_do_not_wrap(c: int, itemsize: int) -> None:
    """A sample of nearly 2^31 elements: what a block's last lanes count up to, beyond the sample's end, would
    be below 0 in 32 bits, and so within the sample."""
    for s in ((2**31 - 1) // c, (2**31 - 40_000) // c | 1):
        planned = plan.plan_elementwise(Problem(1, c, s, itemsize, False, True, SMS), 1)
        view = planned.view
        last = (view.blocks - 1) * view.width + view.lanes
        if last < 2**31:
            assert planned.geometry
        else:
            with pytest.raises(plan.TooLarge):
                _ = planned.geometry
    assert last < 2**31, "no size was small enough"


def test_rows_too_large_for_32_bits() -> None:
    """Offsets within a group of rows, and grids, are counted in 32 bits; everything else in 64."""
    for rows, width in ((1, 2**30), (2**31, 768), (2**31 + 5, 1)):
        size = row_plan.Rows(rows, width, 2, True, 132)
        with pytest.raises(plan.TooLarge):
            row_plan.forward(size)
    assert row_plan.forward(row_plan.Rows(2**24, 4096, 2, True, 132))[0] == "one_pass"
    assert row_plan.gradients(row_plan.Rows(2**24, 4096, 2, True, 132)) is not None


# of bf16: from less than a warp's width up to what only 16 warps hold
WIDTHS = [1, 7, 64, 100, 256, 385, 512, 640, 768, 1000, 1001, 1024, 1280, 2048, 4096, 8192, 12288]


@pytest.mark.parametrize("rows", [1, 3, 64, 4096, 65536])
@pytest.mark.parametrize("width", WIDTHS)
def test_partial_rows_of_a_backward(rows: int, width: int) -> None:
    """A program leaves a row of sums for each set of warps that share a row, not one for each of its rows.
    All of them together are small beside x and dy, if there are enough rows."""
    size = row_plan.Rows(rows, width, 2, True, SMS)
    planned = row_plan.gradients(size)
    assert planned is not None
    tile, geometry = planned.tile, planned.geometry
    assert tile.lanes * tile.parts >= width
    assert geometry.programs <= geometry.groups
    assert (geometry.groups - 1) * tile.unroll * tile.rows < rows
    assert tile.rows % tile.partial_rows == 0
    assert tile.partial_rows <= planned.warps
    assert planned.partials == planned.programs * tile.partial_rows
    if rows * width >= 2**25 and width >= 256:
        assert planned.partials * 2 * width * 4 <= 0.15 * 3 * rows * width * 2


@pytest.mark.parametrize(
    ("width", "lanes"), [(256, 256), (512, 512), (768, 1024), (1024, 1024), (1536, 1024), (4096, 1024)]
)
def test_warps_share_rows_in_the_backward(width: int, lanes: int) -> None:
    """As many as leave at most a quarter of the lanes idle: each has fewer columns to sum then."""
    planned = row_plan.gradients(row_plan.Rows(16384, width, 2, True, SMS))
    assert planned is not None
    assert planned.tile.lanes == lanes
    assert planned.tile.partial_rows == max(1, 1024 // lanes)


@pytest.mark.parametrize("width", [30000, 40000, 40001, 10**6])
@pytest.mark.parametrize("rows", [1, 16, 64, 5000])
def test_columns_of_long_rows(rows: int, width: int) -> None:
    """No warp sums columns of another, and each stores its own share of a row."""
    size = row_plan.Rows(rows, width, 2, True, SMS)
    planned = row_plan.column_gradients(size)
    tile, geometry = planned.tile, planned.geometry
    assert (geometry.blocks - 1) * tile.lanes < width <= geometry.blocks * tile.lanes
    assert tile.partial_rows == 1
    assert planned.partials == geometry.programs
    assert tile.shares == (tile.lanes // size.line if size.vectors else 1)
    assert row_plan.wide_gradients(size).geometry.blocks == planned.shares == geometry.blocks * tile.shares


@pytest.mark.parametrize(
    ("rows", "columns", "halves"),
    [(342, 768, 2), (342, 1024, 2), (1368, 768, 1), (396, 4096, 2), (8, 40000, 2)],
)
def test_sums_of_partial_rows_fill_the_gpu(rows: int, columns: int, halves: int) -> None:
    planned = row_plan.column_sums(rows, columns, halves, SMS)
    tile = planned.tile
    assert planned.programs >= min(SMS, halves * columns // 8)
    assert tile.lanes * 4 >= 32  # whole sectors
    assert (planned.geometry.blocks - 1) * tile.lanes < columns <= planned.geometry.blocks * tile.lanes


def test_sums_of_partial_rows_stay_within_32_bits() -> None:
    """An offset within a step of the sum's loop has 32 bits."""
    planned = row_plan.column_sums(64, 2**28, 2, SMS)
    assert planned.tile.rows * 2 * 2**28 < 2**31
    with pytest.raises(plan.TooLarge):
        row_plan.column_sums(4, 2**30, 2, SMS)


def test_warps_of_a_forward_grow_with_the_width() -> None:
    """A warp has a short row for itself, and needs no other; of a long one a thread holds 4 vectors, as long
    as several programs fit on an SM."""
    warps = {}
    for width in (256, 768, 1024, 4096, 8192, 16384, 28672):
        kind, planned = row_plan.forward(row_plan.Rows(16384, width, 2, True, SMS))
        assert kind == "one_pass"
        warps[width] = planned.warps // planned.tile.rows if planned.tile.rows < planned.warps else 1
    assert warps == {256: 1, 768: 1, 1024: 1, 4096: 4, 8192: 8, 16384: 8, 28672: 16}
