"""Forward, first launch: x -> (count, mean, M2) of every channel -> the coefficient table. Reads x once."""

import triton
import triton.language as tl

from .coefficients import arrive_last, batch_norm_forward
from .moments import finite_or_zero, from_pivoted_sums, merge, merge_along
from .tiles import CYCLES, PLANES, ROWS, RUNS, channels_held, channels_of_block, gather_lanes, lanes_of_channels, tile

SIZES = ["rows", "pitch_v", "width_v", "inner", "channels", "tiles", "pieces", "total_v", "blocks", "splits"]


@triton.jit
def rows_held(lane, size, pitch_v, MODE: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr):
    """How many values a `size` of tiles.tile is for the accumulator of each lane, as wide as `lane`."""
    if MODE == CYCLES:  # the last row may be short
        pitch = pitch_v * VEC
        held = size // pitch + (lane < size % pitch)
    else:
        held = size + lane * 0
    return held.to(ACC)


@triton.jit
def pivoted_sums(raw, mask, pivot, ACC: tl.constexpr, U: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr):
    """Sums over U of (x - pivot) and its square: [R, LANES] each. Loaded flat and reshaped: Triton 3.6 spills on a 3-D load."""
    distance = tl.reshape(raw, (U, R, LANES)).to(ACC) - pivot[None, None, :]
    distance = tl.where(tl.reshape(mask, (U, R, LANES)), distance, 0.0)
    return tl.sum(distance, 0), tl.sum(distance * distance, 0)


@triton.jit
def moments_by_lane(
    x_ptr, block, split, rows, pitch_v, width_v, tiles, pieces, total_v, splits,
    MODE: tl.constexpr, VEC: tl.constexpr, U: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program's share of x: (size as in tiles.tile, mean and M2 of each lane, [LANES]; [1] in RUNS).

    Sums are taken about a pivot, the mean of the program's own first tile, kept in registers: any fixed choice fails on
    some data (x[0] may be a padded zero or a spike, running_mean may be NaN for good).
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PIVOTS: tl.constexpr = 1 if MODE == RUNS else LANES
    base, offs, mask, seen = tile(block, split, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, U * R, LANES)
    # evict_last: the second launch reads x again, backwards, and finds in L2 what is left of it
    raw = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last")
    pivot = tl.sum(tl.sum(tl.reshape(raw, (U, R, LANES)).to(ACC), 0), 0)
    if MODE == RUNS:
        pivot = tl.sum(pivot[None, :], 1)
    held = rows_held(tl.arange(0, PIVOTS), seen, pitch_v, MODE, VEC, ACC)
    pivot = finite_or_zero(pivot / tl.maximum(held, 1.0))
    total, squares = pivoted_sums(raw, mask, pivot, ACC, U, R, LANES)
    for index in tl.range(split + splits, tiles, splits):
        base, offs, mask, size = tile(block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, U * R, LANES)
        raw = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last")
        more_total, more_squares = pivoted_sums(raw, mask, pivot, ACC, U, R, LANES)
        total += more_total
        squares += more_squares
        seen += size
    total, squares = tl.sum(total, 0), tl.sum(squares, 0)
    if MODE == RUNS:
        total, squares = tl.sum(total[None, :], 1), tl.sum(squares[None, :], 1)
    held = rows_held(tl.arange(0, PIVOTS), seen, pitch_v, MODE, VEC, ACC)
    mean, m2 = from_pivoted_sums(held, pivot, total, squares)
    return seen, mean, m2


@triton.jit
def store_partials(
    partials_ptr, block, split, seen, mean, m2, pitch_v, width_v, inner, channels,
    MODE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, FOLD: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Lanes to channels, and out."""
    ACC: tl.constexpr = mean.dtype
    held = channels_held(width_v, inner, channels, MODE, VEC)
    mine_ptr = partials_ptr + tl.cast(split, tl.int64) * (2 * channels)
    if MODE == ROWS or MODE == RUNS:
        offs_c, mask_c = channels_of_block(block, tl.arange(0, mean.shape[0]), held, channels)
        tl.store(mine_ptr + offs_c, mean, mask=mask_c)
        tl.store(mine_ptr + channels + offs_c, m2, mask=mask_c)
    elif POSITIONS == LANES:  # the whole block is one channel
        offs_c, mask_c = channels_of_block(block, tl.arange(0, 1), held, channels)
        count = tl.where(tl.arange(0, LANES) < width_v * VEC, seen, 0).to(ACC)
        _, channel_mean, channel_m2 = merge_along(count[None, :], mean[None, :], m2[None, :], 1)
        tl.store(mine_ptr + offs_c, channel_mean, mask=mask_c)
        tl.store(mine_ptr + channels + offs_c, channel_m2, mask=mask_c)
    else:  # FOLD channels at a time: all at once would need twice the registers
        for start in tl.range(0, held, FOLD):
            offs_c, mask_c = channels_of_block(block, start + tl.arange(0, FOLD), held, channels)
            lane, mask = lanes_of_channels(start + tl.arange(0, FOLD), width_v, inner, channels, MODE, VEC, POSITIONS)
            count = tl.where(mask, rows_held(lane, seen, pitch_v, MODE, VEC, ACC), 0.0)
            _, channel_mean, channel_m2 = merge_along(
                count, gather_lanes(mean, lane, FOLD, POSITIONS), gather_lanes(m2, lane, FOLD, POSITIONS), 1
            )
            tl.store(mine_ptr + offs_c, channel_mean, mask=mask_c)
            tl.store(mine_ptr + channels + offs_c, channel_m2, mask=mask_c)


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x_ptr, partials_ptr, arrivals_ptr, table_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits,
    eps: tl.float64, momentum: tl.float64,
    MODE: tl.constexpr, VEC: tl.constexpr, U: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, POSITIONS: tl.constexpr, MERGE: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """partials: [splits, 2, channels] mean and M2, then [splits, blocks] counts. table: see coefficients.py."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    seen, mean, m2 = moments_by_lane(
        x_ptr, block, split, rows, pitch_v, width_v, tiles, pieces, total_v, splits, MODE, VEC, U, R, LANES
    )  # fmt: skip
    store_partials(
        partials_ptr, block, split, seen, mean, m2, pitch_v, width_v, inner, channels, MODE, VEC, LANES, FOLD, POSITIONS
    )  # fmt: skip
    counts_ptr = partials_ptr + tl.cast(splits, tl.int64) * (2 * channels) + block
    count = seen * inner if MODE == PLANES else (seen // channels if MODE == CYCLES else seen)
    tl.store(counts_ptr + split * blocks, count.to(ACC))
    if arrive_last(arrivals_ptr + block, splits):
        held = channels_held(width_v, inner, channels, MODE, VEC)
        offs_c, mask_c = channels_of_block(block, tl.arange(0, CHANNELS), held, channels)
        # Merged MERGE splits at a time, lane by lane, then along the lanes: no cross-warp step inside the loop.
        all_count = tl.zeros((MERGE, CHANNELS), ACC)
        all_mean = tl.zeros((MERGE, CHANNELS), ACC)
        all_m2 = tl.zeros((MERGE, CHANNELS), ACC)
        for start in tl.range(0, splits, MERGE):
            offs_s = start + tl.arange(0, MERGE)[:, None]
            mask = (offs_s < splits) & mask_c[None, :]
            theirs_ptr = partials_ptr + tl.cast(offs_s, tl.int64) * (2 * channels) + offs_c[None, :]
            # .cg: written by other programs of this launch, so never from L1
            their_mean = tl.load(theirs_ptr, mask=mask, other=0.0, cache_modifier=".cg")
            their_m2 = tl.load(theirs_ptr + channels, mask=mask, other=0.0, cache_modifier=".cg")
            their_count = tl.load(counts_ptr + offs_s * blocks, mask=offs_s < splits, other=0.0, cache_modifier=".cg")
            all_count, all_mean, all_m2 = merge(
                all_count, all_mean, all_m2, tl.broadcast_to(their_count, (MERGE, CHANNELS)), their_mean, their_m2
            )
        all_count, all_mean, all_m2 = merge_along(all_count, all_mean, all_m2, 0)
        batch_norm_forward(
            offs_c, mask_c, all_count, all_mean, all_m2, table_ptr, weight_ptr, bias_ptr,
            running_mean_ptr, running_var_ptr, batches_ptr, channels, eps, momentum, CUMULATIVE, ACC,
        )  # fmt: skip
