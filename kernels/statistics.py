"""Forward, first launch: x -> (count, mean, M2) of every channel -> the coefficient table. Reads x once."""

import triton
import triton.language as tl

from .coefficients import BATCH, CELL, RENORM, arrive_last, batch_norm_forward, store_cell
from .moments import finite_or_zero, from_pivoted_sums, merge, merge_along
from .renorm import batch_renorm_forward
from .tiles import (
    PLANES,
    ROWS,
    RUNS,
    channels_held,
    channels_of_block,
    place,
    start_of,
    sum_by_channel,
    tile,
    values_a_channel,
)

# of the caller, who may have cut them from anywhere: a channel each is loaded as well without alignment
PARAMETERS = ["weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr", "batches_ptr"]
SIZES = [
    "rows", "pitch_v", "width_v", "inner", "channels", "tiles", "pieces", "total_v", "blocks", "splits",
    "group", "cells",
]  # fmt: skip


@triton.jit
def pivoted_sums(
    raw,
    mask,
    pivot,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    U: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums over U of (x - pivot) and its square: [R, LANES] each. Loaded flat and reshaped: Triton 3.6
    spills on a 3-D load.

    RAGGED: some rows of a lane are not there. Lanes that are not there at all may hold anything: nobody
    looks at them."""
    distance = tl.reshape(raw, (U, R, LANES)).to(ACC) - pivot[None, None, :]
    if RAGGED:
        distance = tl.where(tl.reshape(mask, (U, R, LANES)), distance, 0.0)
    return tl.sum(distance, 0), tl.sum(distance * distance, 0)


@triton.jit
def pivot_by_lane(
    sums, size, width_v, inner, channels,
    MODE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, FOLD: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The mean of each lane's channel in one tile, from the sums of its lanes: [LANES], or [1] where a
    block is one channel.

    Any fixed choice of a pivot fails on some data: x[0] may be a padded zero or a spike, running_mean may
    be NaN for good."""
    count = tl.full((1,), values_a_channel(size, inner, channels, MODE), sums.dtype)
    if MODE == ROWS or POSITIONS == LANES:
        offs_k = tl.arange(0, FOLD)
        pivot = sum_by_channel(sums, offs_k, width_v, inner, channels, MODE, VEC, LANES, POSITIONS) / count
    else:
        lane = tl.arange(0, LANES)
        k = lane // inner if MODE == PLANES else lane % channels
        pivot = tl.zeros((LANES,), sums.dtype)
        for start in tl.range(0, channels_held(width_v, inner, channels, MODE, VEC), FOLD):
            offs_k = start + tl.arange(0, FOLD)
            means = (
                sum_by_channel(sums, offs_k, width_v, inner, channels, MODE, VEC, LANES, POSITIONS) / count
            )
            here = (k >= start) & (k < start + FOLD)
            pivot = tl.where(here, tl.gather(means, tl.where(here, k - start, 0), 0), pivot)
    return finite_or_zero(pivot)


@triton.jit
def sums_by_lane(
    x_ptr, block, split, rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, splits,
    MODE: tl.constexpr, VEC: tl.constexpr, U: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
    FOLD: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """One program's share of x: (size as in tiles.tile; pivot, sum and sum of squares about it, of each
    lane: [LANES]).
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    # The block's last tile may lack rows. Its program takes it first, outside the loop, which then needs no
    # test of rows: there are fewer predicate registers than loads to be kept under way.
    last = split + (tiles - 1 - split) // splits * splits
    base, offs, mask, seen = tile(
        block, last, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, U * R, LANES
    )
    # evict_last: the second launch reads x again, backwards, and finds in L2 what is left of it
    raw = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last")
    sums = tl.sum(tl.sum(tl.reshape(raw, (U, R, LANES)).to(ACC), 0), 0)
    pivot = pivot_by_lane(sums, seen, width_v, inner, channels, MODE, VEC, LANES, FOLD, POSITIONS)
    total, squares = pivoted_sums(raw, mask, pivot, True, ACC, U, R, LANES)
    for index in tl.range(split, last, splits):
        base, offs, mask, size = tile(
            block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, U * R, LANES, True
        )  # fmt: skip
        raw = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last")
        more_total, more_squares = pivoted_sums(raw, mask, pivot, MODE == RUNS, ACC, U, R, LANES)
        total += more_total
        squares += more_squares
        seen += size
    return seen, pivot, tl.sum(total, 0), tl.sum(squares, 0)


@triton.jit
def store_moments(
    mine_ptr, block, count, pivot, total, squares, width_v, inner, channels,
    MODE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, FOLD: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Lanes to channels, and out, FOLD channels at a time: all at once would need too many registers."""
    held = channels_held(width_v, inner, channels, MODE, VEC)
    for start in tl.range(0, held, FOLD):
        offs_k = start + tl.arange(0, FOLD)
        offs_c, mask_c = channels_of_block(block, offs_k, held, channels)
        channel_total = sum_by_channel(total, offs_k, width_v, inner, channels, MODE, VEC, LANES, POSITIONS)
        channel_squares = sum_by_channel(
            squares, offs_k, width_v, inner, channels, MODE, VEC, LANES, POSITIONS
        )
        if MODE == ROWS or POSITIONS == LANES:
            channel_pivot = pivot
        else:  # any lane of the channel will do
            first = offs_k * inner if MODE == PLANES else offs_k
            channel_pivot = tl.gather(pivot, tl.where(mask_c, first, 0), 0)
        shift, m2 = from_pivoted_sums(tl.full((1,), count, total.dtype), channel_total, channel_squares)
        tl.store(mine_ptr + offs_c, channel_pivot, mask=mask_c)
        tl.store(mine_ptr + channels + offs_c, shift, mask=mask_c)
        tl.store(mine_ptr + 2 * channels + offs_c, m2, mask=mask_c)


@triton.jit
def merge_splits(
    sample_ptr, counts_ptr, offs_c, mask_c, channels, blocks, splits,
    MERGE: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What all programs of a block found, as one (count, pivot, shift, M2), [CHANNELS].

    Merged MERGE splits at a time, lane by lane, then along the lanes: no cross-warp step inside the loop."""
    all_count = tl.zeros((MERGE, CHANNELS), ACC)
    all_pivot = tl.zeros((MERGE, CHANNELS), ACC)
    all_shift = tl.zeros((MERGE, CHANNELS), ACC)
    all_m2 = tl.zeros((MERGE, CHANNELS), ACC)
    for start in tl.range(0, splits, MERGE):
        offs_s = start + tl.arange(0, MERGE)[:, None]
        mask = (offs_s < splits) & mask_c[None, :]
        theirs_ptr = sample_ptr + tl.cast(offs_s, tl.int64) * (3 * channels) + offs_c[None, :]
        # .cg: written by other programs of this launch, so never from L1
        their_pivot = tl.load(theirs_ptr, mask=mask, other=0.0, cache_modifier=".cg")
        their_shift = tl.load(theirs_ptr + channels, mask=mask, other=0.0, cache_modifier=".cg")
        their_m2 = tl.load(theirs_ptr + 2 * channels, mask=mask, other=0.0, cache_modifier=".cg")
        their_count = tl.load(
            counts_ptr + offs_s * blocks, mask=offs_s < splits, other=0.0, cache_modifier=".cg"
        )
        their_count = tl.broadcast_to(their_count, (MERGE, CHANNELS))
        all_count, all_pivot, all_shift, all_m2 = merge(
            all_count, all_pivot, all_shift, all_m2, their_count, their_pivot, their_shift, their_m2
        )
    return merge_along(all_count, all_pivot, all_shift, all_m2, 0)


@triton.jit
def merge_groups(
    moments_ptr, offs_g, count, channels, group, groups, MEMBERS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """(mean, variance) of the groups offs_g of `group` channels each, from [3, channels] pivot, shift and M2
    of channels of `count` values each. MEMBERS channels of a group are merged at a time."""
    GROUPS: tl.constexpr = offs_g.shape[0]
    all_count = tl.zeros((GROUPS, MEMBERS), ACC)
    all_pivot = tl.zeros((GROUPS, MEMBERS), ACC)
    all_shift = tl.zeros((GROUPS, MEMBERS), ACC)
    all_m2 = tl.zeros((GROUPS, MEMBERS), ACC)
    for start in tl.range(0, group, MEMBERS):
        offs_m = start + tl.arange(0, MEMBERS)[None, :]
        mask = (offs_m < group) & (offs_g < groups)[:, None]
        theirs_ptr = moments_ptr + offs_g[:, None] * group + offs_m
        pivot = tl.load(theirs_ptr, mask=mask, other=0.0, cache_modifier=".cg")
        shift = tl.load(theirs_ptr + channels, mask=mask, other=0.0, cache_modifier=".cg")
        m2 = tl.load(theirs_ptr + 2 * channels, mask=mask, other=0.0, cache_modifier=".cg")
        all_count, all_pivot, all_shift, all_m2 = merge(
            all_count, all_pivot, all_shift, all_m2, tl.where(mask, count, 0.0), pivot, shift, m2
        )
    all_count, centre, moved, m2 = merge_along(all_count, all_pivot, all_shift, all_m2, 1)
    return centre + moved, m2 / tl.where(all_count > 0, all_count, 1.0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def statistics_kernel(
    x_ptr, partials_ptr, arrivals_ptr, table_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    eps: tl.float64, momentum: tl.float64, r_max: tl.float64, d_max: tl.float64,
    warmup: tl.float64, r_steps: tl.float64, d_steps: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells,
    MODE: tl.constexpr, VEC: tl.constexpr, U: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, POSITIONS: tl.constexpr, MERGE: tl.constexpr,
    NORM: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
    CUMULATIVE: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """partials, of each sample: [splits, 3, channels] pivot, shift and M2, then [splits, blocks] counts.
    table: see coefficients.py. group, cells: channels a cell, and cells in all (GroupNorm)."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block, split, sample = place(tl.program_id(0), blocks, splits)
    seen, pivot, total, squares = sums_by_lane(
        x_ptr + start_of(sample, total_v, VEC), block, split,
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, splits,
        MODE, VEC, U, R, LANES, FOLD, POSITIONS,
    )  # fmt: skip
    count = values_a_channel(seen, inner, channels, MODE)
    sample_ptr = partials_ptr + tl.cast(sample, tl.int64) * splits * (3 * channels + blocks)
    store_moments(
        sample_ptr + tl.cast(split, tl.int64) * (3 * channels), block, count, pivot, total, squares,
        width_v, inner, channels, MODE, VEC, LANES, FOLD, POSITIONS,
    )  # fmt: skip
    counts_ptr = sample_ptr + tl.cast(splits, tl.int64) * (3 * channels) + block
    tl.store(counts_ptr + split * blocks, count.to(ACC))
    if arrive_last(arrivals_ptr + sample * blocks + block, splits):
        held = channels_held(width_v, inner, channels, MODE, VEC)
        offs_c, mask_c = channels_of_block(block, tl.arange(0, CHANNELS), held, channels)
        all_count, pivots, shifts, m2 = merge_splits(
            sample_ptr, counts_ptr, offs_c, mask_c, channels, blocks, splits, MERGE, CHANNELS, ACC
        )  # fmt: skip
        if NORM == BATCH:
            batch_norm_forward(
                offs_c, mask_c, all_count, pivots + shifts, m2, table_ptr, weight_ptr, bias_ptr,
                running_mean_ptr, running_var_ptr, batches_ptr, channels, eps, momentum, CUMULATIVE, ACC,
            )  # fmt: skip
        elif NORM == RENORM:
            batch_renorm_forward(
                offs_c, mask_c, all_count, pivots + shifts, m2, table_ptr, weight_ptr, bias_ptr,
                running_mean_ptr, running_var_ptr, batches_ptr, channels, eps, momentum,
                r_max, d_max, warmup, r_steps, d_steps, CUMULATIVE, GUARDED, ACC,
            )  # fmt: skip
        elif NORM == CELL:
            offs_cell = sample * channels + offs_c
            store_cell(table_ptr, offs_cell, mask_c, cells, pivots + shifts, m2 / all_count, eps, ACC)
        else:
            # The channels of a group may lie in several blocks: the last of the sample's blocks merges them.
            # Slot 0 is read by nobody else any more.
            tl.debug_barrier()
            tl.store(sample_ptr + offs_c, pivots, mask=mask_c)
            tl.store(sample_ptr + channels + offs_c, shifts, mask=mask_c)
            tl.store(sample_ptr + 2 * channels + offs_c, m2, mask=mask_c)
            all_blocks = tl.num_programs(0) // splits
            if arrive_last(arrivals_ptr + all_blocks + sample, blocks):
                in_sample = channels // group
                for start in tl.range(0, in_sample, GROUPS):
                    offs_g = start + tl.arange(0, GROUPS)
                    mean, variance = merge_groups(
                        sample_ptr, offs_g, tl.max(all_count, 0), channels, group, in_sample, MEMBERS, ACC
                    )  # fmt: skip
                    store_cell(
                        table_ptr, sample * in_sample + offs_g, offs_g < in_sample,
                        cells, mean, variance, eps, ACC,
                    )  # fmt: skip
