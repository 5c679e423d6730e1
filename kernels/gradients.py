"""Backward. First launch: sums of g and g * (x - p) -> dgamma, dbeta and the table k1, k2, k3. Second: dx =
k1 * g + k2 * (x - p) + k3. Each reads dy and x once. In eval dx = a * g needs no sums, so one launch does
both.

g is the gradient of what the normalization gives: dy itself or, through an activation, dy times its slope
at a * (x - p) + b. Both launches compute that anew. With a residual z it is z's gradient dz as well, so the
first launch writes it, and the second reads it for dy."""

import triton
import triton.language as tl

from .activations import before_activation, unpack
from .coefficients import (
    Channels,
    Gradients,
    GradientSums,
    Parameters,
    arrive_last,
    batch_norm_backward,
    cells_of,
    from_cells,
    group_norm_backward,
    load_or,
)
from .geometry import (
    by_lane,
    channels_held,
    channels_of_block,
    lanes_and_channels,
    place,
    start_of,
    sum_by_channel,
    tile,
)
from .records import Geometry
from .statistics import PARAMETERS, SIZES
from .transform import load_coefficient


@triton.jit
def load_centre(c, sample, table_ptr, g, NORM: tl.constexpr):
    """p of a sample's channels."""
    if NORM == "batch" or NORM == "renorm":
        offs = c.offs
    else:
        offs = cells_of(c.offs, sample, g)
    return tl.load(table_ptr + offs, mask=c.mask, other=0.0)


@triton.jit
def store_channels(to_ptr, offs_c, mask_c, g, sum_g, sum_gd):
    """[2, channels]."""
    tl.store(to_ptr + offs_c, sum_g, mask=mask_c)
    tl.store(to_ptr + g.channels + offs_c, sum_gd, mask=mask_c)


@triton.jit
def merge_splits(sample_ptr, c, g, T: tl.constexpr, ACC: tl.constexpr):
    """What all programs of a block found of its channels, as GradientSums."""
    all_g = tl.full((T.merge, T.channels), 0.0, ACC)
    all_gd = tl.full((T.merge, T.channels), 0.0, ACC)
    for start in tl.range(0, g.splits, T.merge):
        offs_s = start + tl.arange(0, T.merge)[:, None]
        mask = (offs_s < g.splits) & c.mask[None, :]
        theirs_ptr = sample_ptr + tl.cast(offs_s, tl.int64) * (2 * g.channels) + c.offs[None, :]
        all_g += tl.load(theirs_ptr, mask=mask, other=0.0, cache_modifier=".cg")
        all_gd += tl.load(theirs_ptr + g.channels, mask=mask, other=0.0, cache_modifier=".cg")
    return GradientSums(tl.sum(all_g, 0), tl.sum(all_gd, 0))


@triton.jit
def merge_groups(sums_ptr, weight_ptr, offs_g, in_sample, g, T: tl.constexpr, ACC: tl.constexpr):
    """The gradient sums of a sample's groups offs_g, of `in_sample`, weighted by gamma, from [2, channels] of
    its channels."""
    sum_wg = tl.full((T.groups, T.members), 0.0, ACC)
    sum_wgd = tl.full((T.groups, T.members), 0.0, ACC)
    for start in tl.range(0, g.group, T.members):
        offs_m = start + tl.arange(0, T.members)[None, :]
        mask = (offs_m < g.group) & (offs_g < in_sample)[:, None]
        offs_c = offs_g[:, None] * g.group + offs_m
        weight = load_or(weight_ptr, offs_c, mask, 1.0, ACC)
        sum_wg += weight * tl.load(sums_ptr + offs_c, mask=mask, other=0.0, cache_modifier=".cg")
        sum_wgd += weight * tl.load(
            sums_ptr + g.channels + offs_c, mask=mask, other=0.0, cache_modifier=".cg"
        )
    return GradientSums(tl.sum(sum_wg, 1), tl.sum(sum_wgd, 1))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def gradient_sums_kernel(
    dy_ptr, x_ptr, dx_ptr, partials_ptr, arrivals_ptr, table_ptr, gradients_ptr, dweight_ptr, dbias_ptr,
    weight_ptr, sums_ptr, bias_ptr, z_ptr, signs_ptr, dz_ptr,
    count: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells,
    T: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """partials, of each sample: [splits, 2, channels]. dx_ptr is given in eval only (dx = a * g),
    gradients_ptr in training only. Cells within a sample: weight_ptr too, and sums_ptr, [samples, 2,
    channels], receives what each sample adds to dgamma and dbeta. count: values a cell. bias_ptr, z_ptr,
    signs_ptr: what an activation's slope is found from, see transform.py."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells
    )
    of = Parameters(weight_ptr, bias_ptr, None, None, None)
    block, split, sample = place(tl.program_id(0), g)
    offs_lane, mask_lane = lanes_and_channels(block, g, T)
    lanes = Channels(offs_lane, mask_lane)
    p = by_lane(load_centre(lanes, sample, table_ptr, g, NORM), T)
    SLOPED: tl.constexpr = ACT.name != "none" and signs_ptr is None
    if dx_ptr is not None or SLOPED:
        if NORM == "batch" or NORM == "renorm":
            a = load_coefficient(table_ptr, 1, lanes, g)
            b = load_coefficient(table_ptr, 2, lanes, g)
        else:
            p_again, a, b = from_cells(lanes, sample, table_ptr, of, g, ACC)
        a, b = by_lane(a, T), by_lane(b, T)
    sum_g = tl.full((T.rows, T.lanes), 0.0, ACC)
    sum_gd = tl.full((T.rows, T.lanes), 0.0, ACC)
    start_element = start_of(sample, g, T)
    for index in tl.range(split, g.tiles, g.splits):
        t = tile(block, index, g, T)
        base = t.base + start_element
        grad = tl.load(dy_ptr + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_last")
        x = tl.load(x_ptr + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_last")
        if SLOPED:
            grad = before_activation(
                grad, x, p, a, b, None if z_ptr is None else z_ptr + base, t.offs, t.mask, ACT,
                ACC,
            )  # fmt: skip
        elif signs_ptr is not None:
            bits = tile(block, index, g, T, False, True)
            signs = tl.load(
                signs_ptr + start_element // 8 + bits.base + bits.offs, mask=bits.mask, other=0,
                eviction_policy="evict_first",
            )  # fmt: skip
            grad = tl.where(unpack(signs), grad, 0.0)
        if dz_ptr is not None:
            tl.store(dz_ptr + base + t.offs, grad.to(dz_ptr.dtype.element_ty), mask=t.mask)
        if dx_ptr is not None:
            dx = a * grad.to(ACC)
            tl.store(
                dx_ptr + base + t.offs, dx.to(dx_ptr.dtype.element_ty), mask=t.mask,
                eviction_policy="evict_first",
            )  # fmt: skip
        grad = tl.reshape(grad, (T.unroll, T.rows, T.lanes)).to(ACC)
        distance = tl.reshape(x, (T.unroll, T.rows, T.lanes)).to(ACC) - p[None, :, :]
        sum_g += tl.sum(grad, 0)
        sum_gd += tl.sum(grad * distance, 0)
    sum_g, sum_gd = tl.sum(sum_g, 0), tl.sum(sum_gd, 0)
    held = channels_held(g, T)
    sample_ptr = partials_ptr + tl.cast(sample, tl.int64) * g.splits * (2 * g.channels)
    mine_ptr = sample_ptr + tl.cast(split, tl.int64) * (2 * g.channels)
    for start in tl.range(0, held, T.fold):
        offs_k = start + tl.arange(0, T.fold)
        offs_c, mask_c = channels_of_block(block, offs_k, held, g)
        channel_g, channel_gd = sum_by_channel(sum_g, offs_k, g, T), sum_by_channel(sum_gd, offs_k, g, T)
        store_channels(mine_ptr, offs_c, mask_c, g, channel_g, channel_gd)
    if arrive_last(arrivals_ptr + sample * g.blocks + block, g.splits):
        offs_done, mask_done = channels_of_block(block, tl.arange(0, T.channels), held, g)
        c = Channels(offs_done, mask_done)
        sums = merge_splits(sample_ptr, c, g, T, ACC)
        if NORM == "batch" or NORM == "renorm":
            to = Gradients(gradients_ptr, dweight_ptr, dbias_ptr)
            batch_norm_backward(c, sums, table_ptr, to, count, g, NORM == "renorm", ACC)
        else:
            if sums_ptr is not None:
                rstd = tl.load(table_ptr + g.cells + cells_of(c.offs, sample, g), mask=c.mask, other=0.0)
                mine_ptr = sums_ptr + sample * (2 * g.channels)
                store_channels(mine_ptr, c.offs, c.mask, g, rstd * sums.gd, sums.g)
            if gradients_ptr is not None:
                if NORM == "cell":
                    weight = load_or(weight_ptr, c.offs, c.mask, 1.0, ACC)
                    cell = Channels(sample * g.channels + c.offs, c.mask)
                    weighted = GradientSums(weight * sums.g, weight * sums.gd)
                    group_norm_backward(cell, weighted, table_ptr, gradients_ptr, count, g, ACC)
                else:
                    # Slot 0 is read by nobody else any more: see statistics.py.
                    tl.debug_barrier()
                    store_channels(sample_ptr, c.offs, c.mask, g, sums.g, sums.gd)
                    if arrive_last(arrivals_ptr + tl.num_programs(0) // g.splits + sample, g.blocks):
                        in_sample = g.channels // g.group
                        for start in tl.range(0, in_sample, T.groups):
                            offs_g = start + tl.arange(0, T.groups)
                            weighted = merge_groups(sample_ptr, weight_ptr, offs_g, in_sample, g, T, ACC)
                            cell = Channels(sample * in_sample + offs_g, offs_g < in_sample)
                            group_norm_backward(cell, weighted, table_ptr, gradients_ptr, count, g, ACC)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def gradient_transform_kernel(
    dy_ptr, x_ptr, dx_ptr, table_ptr, gradients_ptr, weight_ptr, bias_ptr,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells,
    T: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dx, from the coefficients that gradient_sums_kernel has left."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells
    )
    block, split, sample = place(tl.program_id(0), g)
    offs_c, mask_c = lanes_and_channels(block, g, T)
    lanes = Channels(offs_c, mask_c)
    p = load_centre(lanes, sample, table_ptr, g, NORM)
    if NORM == "batch" or NORM == "renorm":
        k1 = load_coefficient(gradients_ptr, 0, lanes, g)
        k2 = load_coefficient(gradients_ptr, 1, lanes, g)
        k3 = load_coefficient(gradients_ptr, 2, lanes, g)
    else:
        offs_cell = cells_of(offs_c, sample, g)
        rstd = tl.load(table_ptr + g.cells + offs_cell, mask=mask_c, other=0.0)
        k1 = load_or(weight_ptr, offs_c, mask_c, 1.0, ACC) * rstd
        k2 = tl.load(gradients_ptr + offs_cell, mask=mask_c, other=0.0)
        k3 = tl.load(gradients_ptr + g.cells + offs_cell, mask=mask_c, other=0.0)
    if ACT.name != "none":
        if NORM == "batch" or NORM == "renorm":
            b = load_coefficient(table_ptr, 2, lanes, g)
        else:
            b = load_or(bias_ptr, offs_c, mask_c, 0.0, ACC)
        b = by_lane(b, T)
    p, k1, k2, k3 = by_lane(p, T), by_lane(k1, T), by_lane(k2, T), by_lane(k3, T)
    start_element = start_of(sample, g, T)
    for step in tl.range(split, g.tiles, g.splits):
        t = tile(block, g.tiles - 1 - step, g, T)  # backwards, as in the forward
        base = t.base + start_element
        grad = tl.load(dy_ptr + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(x_ptr + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_first").to(ACC)
        if ACT.name != "none":
            grad = before_activation(
                grad, x, p, k1, b, None, t.offs, t.mask, ACT, ACC
            )  # fmt: skip  # k1 is a
        dx = k1 * grad + k2 * (x - p) + k3
        tl.store(
            dx_ptr + base + t.offs, dx.to(dx_ptr.dtype.element_ty), mask=t.mask, eviction_policy="evict_first"
        )
