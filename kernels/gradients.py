"""Backward. First launch: sums of g and g * (x - p) -> dgamma, dbeta and the table k1, k2, k3. Second: dx =
k1 * g + k2 * (x - p) + k3. Each reads dy and x once. In eval dx = a * g needs no sums, so one launch does
both."""

import triton
import triton.language as tl

from .coefficients import arrive_last, batch_norm_backward
from .statistics import PARAMETERS, SIZES
from .tiles import channels_held, channels_of_block, lanes_and_channels, sum_by_channel, tile
from .transform import load_coefficient


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def gradient_sums_kernel(
    dy_ptr, x_ptr, dx_ptr, partials_ptr, arrivals_ptr, table_ptr, gradients_ptr, dweight_ptr, dbias_ptr,
    count: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits,
    MODE: tl.constexpr, VEC: tl.constexpr, U: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, POSITIONS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """partials: [splits, 2, channels]. dx_ptr is given in eval only (dx = a * g), gradients_ptr in training
    only.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    offs_lane, mask_lane = lanes_and_channels(block, pitch_v, width_v, inner, channels, MODE, VEC, LANES)
    p = load_coefficient(table_ptr, 0, offs_lane, mask_lane, channels)
    if dx_ptr is not None:
        a = load_coefficient(table_ptr, 1, offs_lane, mask_lane, channels)
    sum_g = tl.zeros((R, LANES), ACC)
    sum_gd = tl.zeros((R, LANES), ACC)
    for index in tl.range(split, tiles, splits):
        base, offs, mask, _ = tile(
            block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, U * R, LANES
        )  # fmt: skip
        g = tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last")
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last")
        if dx_ptr is not None:
            dx = a * g.to(ACC)
            tl.store(
                dx_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
            )
        g = tl.reshape(g, (U, R, LANES)).to(ACC)
        distance = tl.reshape(x, (U, R, LANES)).to(ACC) - p[None, :, :]
        sum_g += tl.sum(g, 0)
        sum_gd += tl.sum(g * distance, 0)
    sum_g, sum_gd = tl.sum(sum_g, 0), tl.sum(sum_gd, 0)
    held = channels_held(width_v, inner, channels, MODE, VEC)
    mine_ptr = partials_ptr + tl.cast(split, tl.int64) * (2 * channels)
    for start in tl.range(0, held, FOLD):
        offs_k = start + tl.arange(0, FOLD)
        offs_c, mask_c = channels_of_block(block, offs_k, held, channels)
        channel_g = sum_by_channel(sum_g, offs_k, width_v, inner, channels, MODE, VEC, LANES, POSITIONS)
        channel_gd = sum_by_channel(sum_gd, offs_k, width_v, inner, channels, MODE, VEC, LANES, POSITIONS)
        tl.store(mine_ptr + offs_c, channel_g, mask=mask_c)
        tl.store(mine_ptr + channels + offs_c, channel_gd, mask=mask_c)
    if arrive_last(arrivals_ptr + block, splits):
        offs_done, mask_done = channels_of_block(block, tl.arange(0, CHANNELS), held, channels)
        all_g = tl.zeros((MERGE, CHANNELS), ACC)
        all_gd = tl.zeros((MERGE, CHANNELS), ACC)
        for start in tl.range(0, splits, MERGE):
            offs_s = start + tl.arange(0, MERGE)[:, None]
            mask = (offs_s < splits) & mask_done[None, :]
            theirs_ptr = partials_ptr + tl.cast(offs_s, tl.int64) * (2 * channels) + offs_done[None, :]
            all_g += tl.load(theirs_ptr, mask=mask, other=0.0, cache_modifier=".cg")
            all_gd += tl.load(theirs_ptr + channels, mask=mask, other=0.0, cache_modifier=".cg")
        batch_norm_backward(
            offs_done, mask_done, tl.sum(all_g, 0), tl.sum(all_gd, 0),
            table_ptr, gradients_ptr, dweight_ptr, dbias_ptr, channels, count, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def gradient_transform_kernel(
    dy_ptr, x_ptr, dx_ptr, table_ptr, gradients_ptr,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits,
    MODE: tl.constexpr, VEC: tl.constexpr, ROWS_A_TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    offs_c, mask_c = lanes_and_channels(block, pitch_v, width_v, inner, channels, MODE, VEC, LANES)
    p = load_coefficient(table_ptr, 0, offs_c, mask_c, channels)
    k1 = load_coefficient(gradients_ptr, 0, offs_c, mask_c, channels)
    k2 = load_coefficient(gradients_ptr, 1, offs_c, mask_c, channels)
    k3 = load_coefficient(gradients_ptr, 2, offs_c, mask_c, channels)
    for step in tl.range(split, tiles, splits):
        index = tiles - 1 - step  # backwards, as in the forward
        base, offs, mask, _ = tile(
            block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, ROWS_A_TILE, LANES
        )  # fmt: skip
        g = tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        dx = k1 * g + k2 * (x - p) + k3
        tl.store(
            dx_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
        )
