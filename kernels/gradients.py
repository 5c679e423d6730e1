"""Backward. First launch: sums of g and g * (x - p) -> dgamma, dbeta and the table k1, k2, k3. Second: dx =
k1 * g + k2 * (x - p) + k3. Each reads dy and x once. In eval dx = a * g needs no sums, so one launch does
both.

g is the gradient of what the normalization gives: dy itself or, through an activation, dy times its slope
at a * (x - p) + b. Both launches compute that anew. With a residual z it is z's gradient dz as well, so the
first launch writes it, and the second reads it for dy."""

import triton
import triton.language as tl

from .activations import before_activation, byte_tile, unpack
from .coefficients import (
    BATCH,
    CELL,
    RENORM,
    arrive_last,
    batch_norm_backward,
    from_cells,
    group_norm_backward,
    load_or,
)
from .statistics import PARAMETERS, SIZES
from .tiles import (
    by_lane,
    channels_held,
    channels_of_block,
    lanes_and_channels,
    place,
    start_of,
    sum_by_channel,
    tile,
)
from .transform import load_coefficient


@triton.jit
def load_centre(table_ptr, offs_c, mask_c, sample, channels, group, NORM: tl.constexpr):
    """p of the channels offs_c of a sample."""
    if NORM == BATCH or NORM == RENORM:
        offs = offs_c
    else:
        offs = sample * (channels // group) + offs_c // group
    return tl.load(table_ptr + offs, mask=mask_c, other=0.0)


@triton.jit
def merge_splits(
    sample_ptr, offs_c, mask_c, channels, splits,
    MERGE: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What all programs of a block found: sums of g and g * (x - p), [CHANNELS]."""
    all_g = tl.zeros((MERGE, CHANNELS), ACC)
    all_gd = tl.zeros((MERGE, CHANNELS), ACC)
    for start in tl.range(0, splits, MERGE):
        offs_s = start + tl.arange(0, MERGE)[:, None]
        mask = (offs_s < splits) & mask_c[None, :]
        theirs_ptr = sample_ptr + tl.cast(offs_s, tl.int64) * (2 * channels) + offs_c[None, :]
        all_g += tl.load(theirs_ptr, mask=mask, other=0.0, cache_modifier=".cg")
        all_gd += tl.load(theirs_ptr + channels, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(all_g, 0), tl.sum(all_gd, 0)


@triton.jit
def merge_groups(
    sums_ptr, weight_ptr, offs_g, channels, group, groups, MEMBERS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The gamma-weighted sums of the groups offs_g, from [2, channels] sums of g and g * (x - p)."""
    sum_wg = tl.zeros((offs_g.shape[0], MEMBERS), ACC)
    sum_wgd = tl.zeros((offs_g.shape[0], MEMBERS), ACC)
    for start in tl.range(0, group, MEMBERS):
        offs_m = start + tl.arange(0, MEMBERS)[None, :]
        mask = (offs_m < group) & (offs_g < groups)[:, None]
        offs_c = offs_g[:, None] * group + offs_m
        weight = load_or(weight_ptr, offs_c, mask, 1.0, ACC)
        sum_wg += weight * tl.load(sums_ptr + offs_c, mask=mask, other=0.0, cache_modifier=".cg")
        sum_wgd += weight * tl.load(sums_ptr + channels + offs_c, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(sum_wg, 1), tl.sum(sum_wgd, 1)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def gradient_sums_kernel(
    dy_ptr, x_ptr, dx_ptr, partials_ptr, arrivals_ptr, table_ptr, gradients_ptr, dweight_ptr, dbias_ptr,
    weight_ptr, sums_ptr, bias_ptr, z_ptr, signs_ptr, dz_ptr,
    count: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells,
    MODE: tl.constexpr, VEC: tl.constexpr, U: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
    STEP: tl.constexpr, CHANNELS: tl.constexpr, FOLD: tl.constexpr, POSITIONS: tl.constexpr,
    MERGE: tl.constexpr, NORM: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
    NAME: tl.constexpr, PARAMETER: tl.constexpr,
):  # fmt: skip
    """partials, of each sample: [splits, 2, channels]. dx_ptr is given in eval only (dx = a * g),
    gradients_ptr in training only. Cells within a sample: weight_ptr too, and sums_ptr, [samples, 2,
    channels], receives what each sample adds to dgamma and dbeta. count: values a cell. bias_ptr, z_ptr,
    signs_ptr: what an activation's slope is found from, see transform.py."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block, split, sample = place(tl.program_id(0), blocks, splits)
    offs_lane, mask_lane = lanes_and_channels(
        block, pitch_v, width_v, inner, channels, MODE, VEC, LANES, STEP
    )
    p = by_lane(load_centre(table_ptr, offs_lane, mask_lane, sample, channels, group, NORM), LANES, STEP)
    SLOPED: tl.constexpr = NAME != "none" and signs_ptr is None
    if dx_ptr is not None or SLOPED:
        if NORM == BATCH or NORM == RENORM:
            a = load_coefficient(table_ptr, 1, offs_lane, mask_lane, channels)
            b = load_coefficient(table_ptr, 2, offs_lane, mask_lane, channels)
        else:
            p_again, a, b = from_cells(
                offs_lane, mask_lane, sample, channels, group, cells, table_ptr, weight_ptr, bias_ptr, ACC
            )  # fmt: skip
        a, b = by_lane(a, LANES, STEP), by_lane(b, LANES, STEP)
    sum_g = tl.zeros((R, LANES), ACC)
    sum_gd = tl.zeros((R, LANES), ACC)
    start_element = start_of(sample, total_v, VEC)
    for index in tl.range(split, tiles, splits):
        base, offs, mask, _ = tile(
            block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, U * R, LANES
        )  # fmt: skip
        base += start_element
        g = tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last")
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last")
        if SLOPED:
            g = before_activation(
                g, x, p, a, b, None if z_ptr is None else z_ptr + base, offs, mask, NAME, PARAMETER, ACC
            )  # fmt: skip
        elif signs_ptr is not None:
            byte_base, byte_offs, byte_mask = byte_tile(
                block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, U * R, LANES
            )  # fmt: skip
            signs = tl.load(
                signs_ptr + start_element // 8 + byte_base + byte_offs, mask=byte_mask, other=0,
                eviction_policy="evict_first",
            )  # fmt: skip
            g = tl.where(unpack(signs), g, 0.0)
        if dz_ptr is not None:
            tl.store(dz_ptr + base + offs, g.to(dz_ptr.dtype.element_ty), mask=mask)
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
    sample_ptr = partials_ptr + tl.cast(sample, tl.int64) * splits * (2 * channels)
    mine_ptr = sample_ptr + tl.cast(split, tl.int64) * (2 * channels)
    for start in tl.range(0, held, FOLD):
        offs_k = start + tl.arange(0, FOLD)
        offs_c, mask_c = channels_of_block(block, offs_k, held, channels)
        channel_g = sum_by_channel(sum_g, offs_k, width_v, inner, channels, MODE, VEC, LANES, POSITIONS)
        channel_gd = sum_by_channel(sum_gd, offs_k, width_v, inner, channels, MODE, VEC, LANES, POSITIONS)
        tl.store(mine_ptr + offs_c, channel_g, mask=mask_c)
        tl.store(mine_ptr + channels + offs_c, channel_gd, mask=mask_c)
    if arrive_last(arrivals_ptr + sample * blocks + block, splits):
        offs_done, mask_done = channels_of_block(block, tl.arange(0, CHANNELS), held, channels)
        all_g, all_gd = merge_splits(sample_ptr, offs_done, mask_done, channels, splits, MERGE, CHANNELS, ACC)
        if NORM == BATCH or NORM == RENORM:
            batch_norm_backward(
                offs_done, mask_done, all_g, all_gd,
                table_ptr, gradients_ptr, dweight_ptr, dbias_ptr, channels, count, NORM == RENORM, ACC,
            )  # fmt: skip
        else:
            if sums_ptr is not None:
                offs_cell = sample * (channels // group) + offs_done // group
                rstd = tl.load(table_ptr + cells + offs_cell, mask=mask_done, other=0.0)
                tl.store(sums_ptr + sample * (2 * channels) + offs_done, rstd * all_gd, mask=mask_done)
                tl.store(sums_ptr + sample * (2 * channels) + channels + offs_done, all_g, mask=mask_done)
            if gradients_ptr is not None:
                if NORM == CELL:
                    weight = load_or(weight_ptr, offs_done, mask_done, 1.0, ACC)
                    offs_cell = sample * channels + offs_done
                    group_norm_backward(
                        offs_cell, mask_done, weight * all_g, weight * all_gd,
                        table_ptr, gradients_ptr, cells, count, ACC,
                    )  # fmt: skip
                else:
                    # Slot 0 is read by nobody else any more: see statistics.py.
                    tl.debug_barrier()
                    tl.store(sample_ptr + offs_done, all_g, mask=mask_done)
                    tl.store(sample_ptr + channels + offs_done, all_gd, mask=mask_done)
                    if arrive_last(arrivals_ptr + tl.num_programs(0) // splits + sample, blocks):
                        in_sample = channels // group
                        for start in tl.range(0, in_sample, GROUPS):
                            offs_g = start + tl.arange(0, GROUPS)
                            sum_wg, sum_wgd = merge_groups(
                                sample_ptr, weight_ptr, offs_g, channels, group, in_sample, MEMBERS, ACC
                            )  # fmt: skip
                            group_norm_backward(
                                sample * in_sample + offs_g, offs_g < in_sample, sum_wg, sum_wgd,
                                table_ptr, gradients_ptr, cells, count, ACC,
                            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def gradient_transform_kernel(
    dy_ptr, x_ptr, dx_ptr, table_ptr, gradients_ptr, weight_ptr, bias_ptr,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells,
    MODE: tl.constexpr, VEC: tl.constexpr, ROWS_A_TILE: tl.constexpr, LANES: tl.constexpr,
    STEP: tl.constexpr, NORM: tl.constexpr, NAME: tl.constexpr, PARAMETER: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block, split, sample = place(tl.program_id(0), blocks, splits)
    offs_c, mask_c = lanes_and_channels(block, pitch_v, width_v, inner, channels, MODE, VEC, LANES, STEP)
    p = load_centre(table_ptr, offs_c, mask_c, sample, channels, group, NORM)
    if NORM == BATCH or NORM == RENORM:
        k1 = load_coefficient(gradients_ptr, 0, offs_c, mask_c, channels)
        k2 = load_coefficient(gradients_ptr, 1, offs_c, mask_c, channels)
        k3 = load_coefficient(gradients_ptr, 2, offs_c, mask_c, channels)
    else:
        offs_cell = sample * (channels // group) + offs_c // group
        rstd = tl.load(table_ptr + cells + offs_cell, mask=mask_c, other=0.0)
        k1 = load_or(weight_ptr, offs_c, mask_c, 1.0, ACC) * rstd
        k2 = tl.load(gradients_ptr + offs_cell, mask=mask_c, other=0.0)
        k3 = tl.load(gradients_ptr + cells + offs_cell, mask=mask_c, other=0.0)
    if NAME != "none":
        if NORM == BATCH or NORM == RENORM:
            b = load_coefficient(table_ptr, 2, offs_c, mask_c, channels)
        else:
            b = load_or(bias_ptr, offs_c, mask_c, 0.0, ACC)
        b = by_lane(b, LANES, STEP)
    p, k1 = by_lane(p, LANES, STEP), by_lane(k1, LANES, STEP)
    k2, k3 = by_lane(k2, LANES, STEP), by_lane(k3, LANES, STEP)
    start_element = start_of(sample, total_v, VEC)
    for step in tl.range(split, tiles, splits):
        index = tiles - 1 - step  # backwards, as in the forward
        base, offs, mask, _ = tile(
            block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, ROWS_A_TILE, LANES
        )  # fmt: skip
        base += start_element
        g = tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        if NAME != "none":
            g = before_activation(g, x, p, k1, b, None, offs, mask, NAME, PARAMETER, ACC)  # k1 is a
        dx = k1 * g + k2 * (x - p) + k3
        tl.store(
            dx_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
        )
