"""The kernels that write a result element by element, for any normalizer (see normalizers/common.py).

transform_kernel, the second launch of a forward and in eval the only one: y = act(scale * (x - mean) +
shift + residual). It reads x and the residual once. gradient_transform_kernel, the second launch of a
backward: dx = c_dy * dy + c_xmu * (x - mean) + c_one. It reads dy and x once. In eval the first launch
writes dx itself.

With an activation, dy stands for dy times the activation's slope, which both launches of a backward
recompute from x. With a residual that product is the residual's gradient too: the first launch writes it,
and the second reads it in place of dy."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import Affine, activate, before_activation, pack
from .geometry import by_lane, lanes_and_channels, place, start_of, tile
from .memory import Channels, await_launch_before, read, store_rows, write
from .normalizers.batch_norm import from_running_statistics
from .normalizers.common import Parameters
from .records import Geometry
from .reduce import PARAMETERS, SIZES


class Results(NamedTuple):
    """Pointers to where y goes, to the residual that it takes, and to where relu's mask goes, or None."""

    y: Any
    residual: Any
    relu_mask: Any


@triton.jit
def finish_tile(y, to, t, block, index, start, g, T: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr):
    """Adds the residual, applies the activation and stores, for tile t, number `index` of a block of the
    sample that begins at `start`."""
    base = t.base + start
    if to.residual is not None:
        y += read(to.residual + base + t.offs, t.mask).to(ACC)
    activated = activate(y, ACT).to(to.y.dtype.element_ty)
    write(to.y + base + t.offs, activated, t.mask)
    if to.relu_mask is not None:  # after the other store: before it, Triton 3.9 spills a register [sass]
        passes = ~(y <= 0)  # NaN too, as in torch
        if to.relu_mask.dtype.element_ty == tl.uint8:
            bits = tile(block, index, g, T, False, True)
            tl.store(to.relu_mask + start // 8 + bits.base + bits.offs, pack(passes), mask=bits.mask)
        else:
            tl.store(to.relu_mask + base + t.offs, passes, mask=t.mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def transform_kernel(
    x_ptr, y_ptr, stats_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr, residual_ptr, relu_mask_ptr,
    eps: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups,
    T: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """NORM: the Normalizer that reads its coefficients from stats; None: the running statistics are used,
    as in eval, and stats, if given, receives the coefficients for a backward. not CENTRED: y = scale * x,
    which is the whole backward of eval if no parameter needs a gradient. ACT: the activation (see
    activations.py). relu_mask receives a bit or a byte for each element of x, 1 where relu lets it
    through."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups
    )
    params = Parameters(weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr)
    block, split, sample = place(tl.program_id(0), g)
    c = lanes_and_channels(block, g, T)
    await_launch_before(PDL)
    if NORM is None:
        mean, scale, shift, rstd = from_running_statistics(c, params, eps, ACC)
        if stats_ptr is not None:
            first = c.mask & (split == 0)
            if T.mode == "nchw_packed":  # of a channel's many lanes the first one stores
                lane = tl.arange(0, T.lanes // T.channel_align) * T.channel_align
                first = first & ((block * (g.width_v * T.vec) + lane) % g.inner == 0)
            elif T.mode != "nchw":
                first = first & (block * (g.width_v * T.vec) + tl.arange(0, T.lanes) < g.channels)
            store_rows(stats_ptr, Channels(c.offs, first), g.channels, mean, scale, shift, rstd)
    else:
        mean, scale, shift = NORM.coefficients(c, sample, stats_ptr, params, g, ACC)
    mean, scale, shift = by_lane(mean, T), by_lane(scale, T), by_lane(shift, T)
    if batches_ptr is not None:  # num_batches_tracked: the first launch reads it, so this one writes it
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    start, to = start_of(sample, g, T), Results(y_ptr, residual_ptr, relu_mask_ptr)
    for step in tl.range(split, g.tiles, g.splits):
        index = g.tiles - 1 - step  # backwards: the first launch has left the end of x in L2
        t = tile(block, index, g, T)
        x = read(x_ptr + start + t.base + t.offs, t.mask).to(ACC)
        y = scale * (x - mean) + shift if CENTRED else scale * x
        finish_tile(y, to, t, block, index, start, g, T, ACT, ACC)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def gradient_transform_kernel(
    dy_ptr, x_ptr, dx_ptr, stats_ptr, dx_coeffs_ptr, weight_ptr, bias_ptr,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups,
    T: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dx from the coefficients that gradient_sums_kernel has stored."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups
    )
    block, split, sample = place(tl.program_id(0), g)
    c = lanes_and_channels(block, g, T)
    params = Parameters(weight_ptr, bias_ptr, None, None, None)
    await_launch_before(PDL)
    mean, scale, shift = NORM.coefficients(c, sample, stats_ptr, params, g, ACC)
    c_dy, c_xmu, c_one = NORM.dx_coefficients(c, sample, stats_ptr, dx_coeffs_ptr, params, g, ACC)
    mean, shift = by_lane(mean, T), by_lane(shift, T)
    c_dy, c_xmu, c_one = by_lane(c_dy, T), by_lane(c_xmu, T), by_lane(c_one, T)
    start_element = start_of(sample, g, T)
    for step in tl.range(split, g.tiles, g.splits):
        t = tile(block, g.tiles - 1 - step, g, T)  # backwards, as in the forward
        base = t.base + start_element
        grad = read(dy_ptr + base + t.offs, t.mask).to(ACC)
        x = read(x_ptr + base + t.offs, t.mask).to(ACC)
        if ACT.name != "none":
            affine = Affine(mean, c_dy, shift)  # c_dy is the scale
            grad = before_activation(grad, x, affine, None, t.offs, t.mask, ACT, ACC)
        dx = c_dy * grad + c_xmu * (x - mean) + c_one
        write(dx_ptr + base + t.offs, dx, t.mask)
