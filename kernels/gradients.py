"""Backward. First launch: sums of g and g * (x - p) -> dgamma, dbeta and the table k1, k2, k3. Second: dx =
k1 * g + k2 * (x - p) + k3. Each reads dy and x once. In eval dx = a * g needs no sums, so one launch does
both.

g is the gradient of what the normalization gives: dy itself or, through an activation, dy times its slope
at a * (x - p) + b. Both launches compute that anew. With a residual z it is z's gradient dz as well, so the
first launch writes it, and the second reads it for dy."""

import triton
import triton.language as tl

from .activations import Affine, before_activation, unpack
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
from .normalizers.common import (
    Channels,
    Gradients,
    GradientSums,
    Parameters,
    Workspace,
    arrive_last,
    store_sums,
)
from .records import Geometry
from .statistics import PARAMETERS, SIZES


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
    p, a, b = NORM.coefficients(lanes, sample, table_ptr, of, g, ACC)
    p, a, b = by_lane(p, T), by_lane(a, T), by_lane(b, T)
    SLOPED: tl.constexpr = ACT.name != "none" and signs_ptr is None
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
                grad, x, Affine(p, a, b), None if z_ptr is None else z_ptr + base, t.offs, t.mask, ACT, ACC
            )
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
        store_sums(mine_ptr, Channels(offs_c, mask_c), g, channel_g, channel_gd)
    if arrive_last(arrivals_ptr + sample * g.blocks + block, g.splits):
        offs_done, mask_done = channels_of_block(block, tl.arange(0, T.channels), held, g)
        c = Channels(offs_done, mask_done)
        sums = merge_splits(sample_ptr, c, g, T, ACC)
        at = Workspace(sample, sample_ptr, arrivals_ptr, table_ptr)
        to = Gradients(gradients_ptr, dweight_ptr, dbias_ptr, sums_ptr, count)
        NORM.finalize_backward(c, sums, at, of, to, g, T, ACC)


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
    of = Parameters(weight_ptr, bias_ptr, None, None, None)
    p, a, b = NORM.coefficients(lanes, sample, table_ptr, of, g, ACC)
    k1, k2, k3 = NORM.dx_coefficients(lanes, sample, table_ptr, gradients_ptr, of, g, ACC)
    p, b = by_lane(p, T), by_lane(b, T)
    k1, k2, k3 = by_lane(k1, T), by_lane(k2, T), by_lane(k3, T)
    start_element = start_of(sample, g, T)
    for step in tl.range(split, g.tiles, g.splits):
        t = tile(block, g.tiles - 1 - step, g, T)  # backwards, as in the forward
        base = t.base + start_element
        grad = tl.load(dy_ptr + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(x_ptr + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_first").to(ACC)
        if ACT.name != "none":
            k = Affine(p, k1, b)  # k1 is a
            grad = before_activation(grad, x, k, None, t.offs, t.mask, ACT, ACC)
        dx = k1 * grad + k2 * (x - p) + k3
        tl.store(
            dx_ptr + base + t.offs, dx.to(dx_ptr.dtype.element_ty), mask=t.mask, eviction_policy="evict_first"
        )
