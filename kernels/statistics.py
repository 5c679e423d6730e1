"""Forward, first launch: x -> (count, mean, M2) of every channel -> the coefficient table. Reads x once."""

import triton
import triton.language as tl

from .coefficients import arrive_last, batch_norm_forward
from .moments import finite_or_zero, from_pivoted_sums, merge, merge_along
from .tiles import CYCLES, PLANES, ROWS, RUNS, channels_of_block, gather_lanes, lanes_of_channels, tile

SIZES = ["rows", "pitch_v", "width_v", "inner", "channels", "tiles", "pieces", "total_v", "blocks", "splits"]


@triton.jit
def rows_held(size, pitch_v, MODE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr):
    """How many values a `size` of tiles.tile is for each accumulator: [1, 1], or [1, LANES] where the last row may be short."""
    if MODE == CYCLES:
        pitch = pitch_v * VEC
        held = (size // pitch + (tl.arange(0, LANES) < size % pitch)[None, :]).to(ACC)
    else:
        held = tl.full((1, 1), size, ACC)
    return tl.where(held > 0, held, 1.0)


@triton.jit
def moments_of_split(
    x_ptr, block, split, rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, splits,
    MODE: tl.constexpr, VEC: tl.constexpr, U: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """One program's share: (count, mean, M2), each [CHANNELS] ([1] for count where it is the same for all).

    Sums are taken about a pivot, the mean of the program's own first tile, kept in registers: any fixed choice fails on
    some data (x[0] may be a padded zero or a spike, running_mean may be NaN for good).
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PIVOTS: tl.constexpr = 1 if MODE == RUNS else LANES
    pivot = tl.zeros((1, PIVOTS), ACC)
    total = tl.zeros((R, LANES), ACC)
    squares = tl.zeros((R, LANES), ACC)
    seen = 0
    for index in tl.range(split, tiles, splits):
        base, offs, mask, size = tile(
            block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, U * R, LANES
        )  # fmt: skip
        # evict_last: the second launch reads x again, backwards, and finds in L2 what is left of it
        raw = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last")
        if index == split:
            first = tl.sum(raw.to(ACC), 0)[None, :]
            if MODE == RUNS:
                first = tl.sum(first, 1)[:, None]
            pivot = finite_or_zero(first / rows_held(size, pitch_v, MODE, VEC, LANES, ACC))
        value = tl.reshape(raw, (U, R, LANES)).to(ACC)
        distance = tl.where(tl.reshape(mask, (U, R, LANES)), value - pivot[None, :, :], 0.0)
        total += tl.sum(distance, 0)
        squares += tl.sum(distance * distance, 0)
        seen += size
    total, squares, pivot = tl.sum(total, 0), tl.sum(squares, 0), tl.sum(pivot, 0)  # [LANES]
    if MODE == ROWS:
        count = tl.full((1,), seen, ACC)
        mean, m2 = from_pivoted_sums(count, pivot, total, squares)
    elif MODE == RUNS:
        count = tl.full((1,), seen, ACC)
        mean, m2 = from_pivoted_sums(
            count, pivot, tl.sum(total[None, :], 1), tl.sum(squares[None, :], 1)
        )  # fmt: skip
    else:
        # Lane by lane first: each has a pivot of its own. In CYCLES the last row may be short.
        if MODE == CYCLES:
            count = tl.full((1,), seen // channels, ACC)
        else:
            count = tl.full((1,), seen * inner, ACC)
        held = tl.broadcast_to(tl.sum(rows_held(seen, pitch_v, MODE, VEC, LANES, ACC), 0), (LANES,))
        mean, m2 = from_pivoted_sums(held, pivot, total, squares)
        if CHANNELS == 1:
            held = tl.where(tl.arange(0, LANES) < width_v * VEC, held, 0.0)
            _, mean, m2 = merge_along(held[None, :], mean[None, :], m2[None, :], 1)
        else:
            lane, mask = lanes_of_channels(width_v, inner, channels, MODE, VEC, LANES, CHANNELS, POSITIONS)
            held = tl.where(mask, gather_lanes(held, lane, CHANNELS, POSITIONS), 0.0)
            mean = gather_lanes(mean, lane, CHANNELS, POSITIONS)
            m2 = gather_lanes(m2, lane, CHANNELS, POSITIONS)
            _, mean, m2 = merge_along(held, mean, m2, 1)
    return count, mean, m2


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    x_ptr, partials_ptr, arrivals_ptr, table_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits,
    eps: tl.float64, momentum: tl.float64,
    MODE: tl.constexpr, VEC: tl.constexpr, U: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, MERGE: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """partials: [splits, 2, channels] mean and M2, then [splits, blocks] counts. table: see coefficients.py."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    count, mean, m2 = moments_of_split(
        x_ptr, block, split, rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, splits,
        MODE, VEC, U, R, LANES, CHANNELS, POSITIONS,
    )  # fmt: skip
    offs_c, mask_c = channels_of_block(block, width_v, inner, channels, MODE, VEC, CHANNELS)
    counts_ptr = partials_ptr + tl.cast(splits, tl.int64) * (2 * channels) + block
    mine_ptr = partials_ptr + tl.cast(split, tl.int64) * (2 * channels) + offs_c
    tl.store(mine_ptr, mean, mask=mask_c)
    tl.store(mine_ptr + channels, m2, mask=mask_c)
    tl.store(counts_ptr + split * blocks + tl.arange(0, 1), count)
    if arrive_last(arrivals_ptr + block, splits):
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
