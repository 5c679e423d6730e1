"""One-pass GroupNorm, forward and backward: contiguous groups that fit in a program's registers are read once
and stay there.

A program takes the groups of a OnePassTile (one, unless they are tiny) as `tiles` tiles of one 16-byte vector
a thread, so that all of its loads are in flight at once and 16-bit data stays packed until it is used. Where
sizes are not powers of two, the rest of a tile is masked: that costs registers, not traffic. A thread adds up
its own elements of all tiles before sums cross threads, once for each statistic.

A group that fits takes one pass however few groups there are: by benchmarks/model.py a program is done with
80 KB in about 4 us, and two passes cost more than that in a launch and in merging partial results."""

import triton
import triton.language as tl

from .activations import Affine, activate, before_activation, pack, unpack
from .memory import (
    Channels,
    as_scalar,
    let_next_launch_start,
    load_or,
    load_row,
    read,
    store_rows,
    write,
)
from .moments import not_negative, product, product_in_tile
from .normalizers.common import GradientSums
from .normalizers.group_norm import group_norm_dx_coeffs, group_rstd
from .records import GroupGeometry

SIZES = list(GroupGeometry._fields)
PARAMETERS = ["weight_ptr", "bias_ptr"]
THREADS = tl.constexpr(128)  # of the smallest program: see group_plan.py


@triton.jit
def vectors(first, K: tl.constexpr, g, T: tl.constexpr):
    """Tile K of the groups from `first` on: element offsets from the first group's start, [rows, vec], their
    mask, [rows, 1], each row's channel in its sample, [rows, 1], and whether there is one, [rows, 1]."""
    row = tl.arange(0, T.rows)[:, None]
    channel = (row // T.span) % T.channels + (K // T.pieces) * T.channels
    group = row // (T.span * T.channels)
    vector = row % T.span + (K % T.pieces) * T.span
    exists = (channel < g.group_size) & (first + group < g.groups)
    start = ((group * g.group_size + channel) * g.inner_v + vector) * T.vec
    offs_c = (first + group) % g.groups_per_sample * g.group_size + channel
    return start + tl.arange(0, T.vec)[None, :], exists & (vector < g.inner_v), offs_c, exists


@triton.jit
def sum_rows(rows, COUNT: tl.constexpr):
    """[rows] -> [COUNT]: the sums of those of each group or channel."""
    return tl.sum(tl.reshape(rows, (COUNT, rows.shape[0] // COUNT)), 1)


@triton.jit
def sum_two_rows(a, b, COUNT: tl.constexpr):
    """sum_rows of both, in one step across threads."""
    both = tl.reshape(tl.join(a, b), (COUNT, a.shape[0] // COUNT, 2))
    return tl.split(tl.sum(both, 1))


@triton.jit
def by_row(values, T: tl.constexpr):
    """Broadcasts values of groups or channels to the rows of a tile: [rows, 1]."""
    COUNT: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], (COUNT, T.rows // COUNT)), (T.rows, 1))


@triton.jit
def by_channel(values, T: tl.constexpr):
    """Broadcasts values of groups to their channels: [groups * channels]."""
    return tl.reshape(tl.broadcast_to(values[:, None], (T.groups, T.channels)), (T.groups * T.channels,))


@triton.jit
def groups_of(first, g, T: tl.constexpr):
    """The groups of a program."""
    offs_group = first + tl.arange(0, T.groups)
    return Channels(offs_group, offs_group < g.groups)


@triton.jit
def affine_of(offs_c, exists, mean, rstd, weight_ptr, bias_ptr, T: tl.constexpr, ACC: tl.constexpr):
    """The Affine of each row of a tile, from its channels and its groups' mean and rstd."""
    scale = load_or(weight_ptr, offs_c, exists, 1.0, ACC) * by_row(rstd, T)
    return Affine(by_row(mean, T), scale, load_or(bias_ptr, offs_c, exists, 0.0, ACC))


@triton.jit
def byte_of(offs):
    """The offset of the byte with a vector's 8 bits of relu's mask: [rows, 1]."""
    tl.static_assert(offs.shape[1] == 8)
    return tl.min(offs, 1)[:, None] // 8


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def group_norm_kernel(
    x_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, residual_ptr, relu_mask_ptr,
    eps: tl.float64,
    groups, group_size, inner_v, groups_per_sample,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """stats: [2, groups], mean and rstd. residual, relu_mask (bits with vec 8 only) and ACT are as in
    elementwise.py."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    TILES: tl.constexpr = T.tiles
    g = GroupGeometry(groups, group_size, inner_v, groups_per_sample)
    first = tl.program_id(0) * T.groups
    base = tl.cast(first, tl.int64) * group_size * (tl.cast(inner_v, tl.int64) * T.vec)
    tiles = ()
    for k in tl.static_range(TILES):
        offs, mask, _, _ = vectors(first, k, g, T)
        tiles = tiles + (read(x_ptr + base + offs, mask),)
    total = tl.full((T.rows,), 0.0, ACC)
    for k in tl.static_range(TILES):
        total += tl.sum(tiles[k].to(ACC), 1)
    count = as_scalar(1.0, ACC) * group_size * inner_v * T.vec
    mean = sum_rows(total, T.groups) / count
    moved = tl.full((T.rows,), 0.0, ACC)
    squares = tl.full((T.rows,), 0.0, ACC)
    for k in tl.static_range(TILES):
        _, mask, _, _ = vectors(first, k, g, T)
        distance = tl.where(mask, tiles[k].to(ACC) - by_row(mean, T), 0.0)
        moved += tl.sum(distance, 1)
        squares += tl.sum(product_in_tile(distance, distance, T.vec, THREADS), 1)
    moved, squares = sum_two_rows(moved, squares, T.groups)
    # the sum of large values has lost digits that the sum of their distances keeps
    shift = moved / count
    mean += shift
    variance = not_negative(squares / count - shift * shift)
    rstd = group_rstd(variance, as_scalar(eps, ACC), ACC)
    store_rows(stats_ptr, groups_of(first, g, T), groups, mean, rstd)
    for k in tl.static_range(TILES):
        offs, mask, offs_c, exists = vectors(first, k, g, T)
        affine = affine_of(offs_c, exists, mean, rstd, weight_ptr, bias_ptr, T, ACC)
        y = affine.scale * (tiles[k].to(ACC) - affine.mean) + affine.shift
        if residual_ptr is not None:
            y += read(residual_ptr + base + offs, mask).to(ACC)
        activated = activate(y, ACT).to(y_ptr.dtype.element_ty)
        write(y_ptr + base + offs, activated, mask)
        if relu_mask_ptr is not None:
            passes = ~(y <= 0)  # NaN too, as in torch
            if relu_mask_ptr.dtype.element_ty == tl.uint8:
                tl.store(relu_mask_ptr + base // 8 + byte_of(offs), pack(passes), mask=mask)
            else:
                tl.store(relu_mask_ptr + base + offs, passes, mask=mask)


@triton.jit
def side_by_side(values, COUNT: tl.constexpr, POWER: tl.constexpr):
    """COUNT tensors of [rows] -> [rows, 2 ** POWER], in their order, with zeros behind them."""
    for _ in tl.static_range(COUNT, 2**POWER):
        values = values + (tl.zeros_like(values[0]),)
    for k in tl.static_range(POWER):
        joined = ()
        for i in tl.static_range(2 ** (POWER - 1 - k)):
            joined = joined + (tl.join(values[i], values[i + 2 ** (POWER - 1 - k)]),)
        values = joined
    return tl.reshape(values[0], (values[0].shape[0], 2**POWER))


@triton.jit
def store_channel_sums(sums_ptr, values, first, g, T: tl.constexpr):
    """Stores what each channel adds to dgamma and dbeta, from the sums of rows of each set of channels, all
    in one step across threads."""
    COUNT: tl.constexpr = T.groups * T.channels
    POWER: tl.constexpr = T.power_of_sums
    both = side_by_side(values, 2 * (T.tiles // T.pieces), POWER)
    sums = tl.sum(tl.reshape(both, (COUNT, T.span, 2**POWER)), 1)
    lane, which = tl.arange(0, COUNT)[:, None], tl.arange(0, 2**POWER)[None, :]
    channel, group = lane % T.channels + which // 2 * T.channels, first + lane // T.channels
    channels = g.groups_per_sample * g.group_size
    sample, offs_c = group // g.groups_per_sample, group % g.groups_per_sample * g.group_size + channel
    to_ptr = sums_ptr + (tl.cast(sample, tl.int64) * 2 + which % 2) * channels + offs_c
    tl.store(to_ptr, sums, mask=(channel < g.group_size) & (group < g.groups))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def group_norm_gradients_kernel(
    dy_ptr, x_ptr, dx_ptr, stats_ptr, weight_ptr, sums_ptr, bias_ptr, relu_mask_ptr, dresidual_ptr,
    groups, group_size, inner_v, groups_per_sample,
    T: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """sums, if given, receives what each sample adds to dgamma and dbeta, [samples, 2, channels]. The formula
    of dx is at group_norm_dx_coeffs. dy and x stay as they are loaded, and dy times the activation's slope is
    found from them twice, which takes fewer registers than to keep it; relu's and relu6's is 0 or dy
    itself."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    TILES: tl.constexpr = T.tiles
    SLOPED: tl.constexpr = ACT.name != "none" and relu_mask_ptr is None
    CLIPPED: tl.constexpr = ACT.name == "relu" or ACT.name == "relu6"
    g = GroupGeometry(groups, group_size, inner_v, groups_per_sample)
    first = tl.program_id(0) * T.groups
    base = tl.cast(first, tl.int64) * group_size * (tl.cast(inner_v, tl.int64) * T.vec)
    xs = ()
    dys = ()
    for k in tl.static_range(TILES):
        offs, mask, _, _ = vectors(first, k, g, T)
        dys = dys + (read(dy_ptr + base + offs, mask),)
        xs = xs + (read(x_ptr + base + offs, mask),)
    let_next_launch_start(PDL)
    mine = groups_of(first, g, T)
    mean, rstd = load_row(stats_ptr, 0, mine, groups), load_row(stats_ptr, 1, mine, groups)
    sum_wdy = tl.full((T.rows,), 0.0, ACC)
    sum_wdy_xmu = tl.full((T.rows,), 0.0, ACC)
    channel_dy = tl.full((T.rows,), 0.0, ACC)
    channel_dy_xmu = tl.full((T.rows,), 0.0, ACC)
    masked = ()
    to_sums = ()
    for k in tl.static_range(TILES):
        offs, mask, offs_c, exists = vectors(first, k, g, T)
        grad = dys[k]  # 0 where the mask is not set
        if relu_mask_ptr is not None:
            if relu_mask_ptr.dtype.element_ty == tl.uint8:
                passes = unpack(tl.load(relu_mask_ptr + base // 8 + byte_of(offs), mask=mask, other=0))
            else:
                passes = tl.load(relu_mask_ptr + base + offs, mask=mask, other=0)
            grad = tl.where(passes, grad, 0.0)
        elif SLOPED:
            affine = affine_of(offs_c, exists, mean, rstd, weight_ptr, bias_ptr, T, ACC)
            grad = before_activation(grad, xs[k], affine, None, offs, mask, ACT, ACC)
        if CLIPPED:
            masked = masked + (grad.to(dy_ptr.dtype.element_ty),)
        if dresidual_ptr is not None:
            write(dresidual_ptr + base + offs, grad, mask, "")
        grad = grad.to(ACC)
        distance = xs[k].to(ACC) - by_row(mean, T)
        channel_dy += tl.sum(grad, 1)
        channel_dy_xmu += tl.sum(product_in_tile(grad, distance, T.vec, THREADS), 1)
        if k % T.pieces == T.pieces - 1:
            weight = tl.reshape(load_or(weight_ptr, offs_c, exists, 1.0, ACC), (T.rows,))
            sum_wdy += product(weight, channel_dy)
            sum_wdy_xmu += product(weight, channel_dy_xmu)
            of_weight = product(tl.reshape(by_row(rstd, T), (T.rows,)), channel_dy_xmu)
            to_sums = to_sums + (of_weight, channel_dy)
            channel_dy = tl.full((T.rows,), 0.0, ACC)
            channel_dy_xmu = tl.full((T.rows,), 0.0, ACC)
    count = as_scalar(1.0, ACC) * group_size * inner_v * T.vec
    sums = GradientSums(*sum_two_rows(sum_wdy, sum_wdy_xmu, T.groups))
    c_xmu, c_one = group_norm_dx_coeffs(rstd, sums, count)
    for k in tl.static_range(TILES):
        offs, mask, offs_c, exists = vectors(first, k, g, T)
        affine = affine_of(offs_c, exists, mean, rstd, weight_ptr, bias_ptr if SLOPED else None, T, ACC)
        if CLIPPED:
            grad = masked[k].to(ACC)
        elif SLOPED:
            grad = before_activation(dys[k], xs[k], affine, None, offs, mask, ACT, ACC)
        else:
            grad = dys[k].to(ACC)
        distance = xs[k].to(ACC) - affine.mean
        dx = affine.scale * grad + by_row(c_xmu, T) * distance + by_row(c_one, T)
        write(dx_ptr + base + offs, dx, mask)
    if sums_ptr is not None:
        store_channel_sums(sums_ptr, to_sums, first, g, T)
