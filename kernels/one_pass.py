"""One-pass GroupNorm, forward and backward: contiguous groups that fit in a program's registers are read once
and stay there.

A program takes the groups of a OnePassTile (one, unless they are tiny) as `tiles` tiles of one 16-byte vector
a thread, so that all of its loads are in flight at once and 16-bit data stays packed until it is used. Where
sizes are not powers of two, the rest of a tile is masked: that costs registers, not traffic."""

import triton
import triton.language as tl

from .activations import Affine, activate, before_activation, pack, unpack
from .memory import Channels, as_scalar, load_or, load_row, read, store_rows, write
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
    mask, [rows, 1], and, for each of the tile's groups * channels channels, its index in its group and the
    group's index, counted from `first`."""
    row = tl.arange(0, T.rows)
    channel = (row // T.span) % T.channels + (K // T.pieces) * T.channels
    group = row // (T.span * T.channels)
    vector = row % T.span + (K % T.pieces) * T.span
    mask = (channel < g.group_size) & (vector < g.inner_v) & (first + group < g.groups)
    start = ((group * g.group_size + channel) * g.inner_v + vector) * T.vec
    lane = tl.arange(0, T.groups * T.channels)
    return (
        start[:, None] + tl.arange(0, T.vec)[None, :],
        mask[:, None],
        lane % T.channels + (K // T.pieces) * T.channels,
        lane // T.channels,
    )


@triton.jit
def sum_by_channel(values, T: tl.constexpr):
    """[rows, vec] -> [groups * channels]."""
    return tl.sum(tl.reshape(tl.sum(values, 1), (T.groups * T.channels, T.span)), 1)


@triton.jit
def sum_by_group(values, T: tl.constexpr):
    """[rows, vec] -> [groups]."""
    return tl.sum(tl.reshape(tl.sum(values, 1), (T.groups, T.channels * T.span)), 1)


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
def affine_of(channel, group, mean, rstd, weight_ptr, bias_ptr, g, T: tl.constexpr, ACC: tl.constexpr):
    """The Affine of each row of a tile, from what `vectors` says of its channels."""
    offs_c = group % g.groups_per_sample * g.group_size + channel
    exists = channel < g.group_size
    scale = by_row(load_or(weight_ptr, offs_c, exists, 1.0, ACC), T) * by_row(rstd, T)
    shift = by_row(load_or(bias_ptr, offs_c, exists, 0.0, ACC), T)
    return Affine(by_row(mean, T), scale, shift)


@triton.jit
def byte_of(offs):
    """The offset of the byte with a vector's 8 bits of relu's mask: [rows, 1]."""
    tl.static_assert(offs.shape[1] == 8)
    return tl.min(offs, 1)[:, None] // 8


@triton.jit
def through_activation(dy, x, affine, relu_mask_ptr, base, offs, mask, ACT: tl.constexpr, ACC: tl.constexpr):
    """dy of a tile -> the gradient of the activation's input."""
    if relu_mask_ptr is not None:
        relu_mask = tl.load(relu_mask_ptr + base // 8 + byte_of(offs), mask=mask, other=0)
        grad = tl.where(unpack(relu_mask), dy, 0.0).to(ACC)
    else:
        grad = before_activation(dy, x, affine, None, offs, mask, ACT, ACC)
    return grad


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def group_norm_kernel(
    x_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, residual_ptr, relu_mask_ptr,
    eps: tl.float64,
    groups, group_size, inner_v, groups_per_sample,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """stats: [2, groups], mean and rstd. residual, relu_mask (with vec 8 only) and ACT are as in
    elementwise.py."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    TILES: tl.constexpr = T.tiles
    g = GroupGeometry(groups, group_size, inner_v, groups_per_sample)
    first = tl.program_id(0) * T.groups
    base = tl.cast(first, tl.int64) * group_size * (tl.cast(inner_v, tl.int64) * T.vec)
    tiles = ()
    total = tl.full((T.groups,), 0.0, ACC)
    for k in tl.static_range(TILES):
        offs, mask, _, _ = vectors(first, k, g, T)
        tiles = tiles + (read(x_ptr + base + offs, mask),)
    for k in tl.static_range(TILES):
        total += sum_by_group(tiles[k].to(ACC), T)
    count = as_scalar(1.0, ACC) * group_size * inner_v * T.vec
    mean = total / count
    moved = tl.full((T.groups,), 0.0, ACC)
    squares = tl.full((T.groups,), 0.0, ACC)
    for k in tl.static_range(TILES):
        _, mask, _, _ = vectors(first, k, g, T)
        distance = tl.where(mask, tiles[k].to(ACC) - by_row(mean, T), 0.0)
        moved += sum_by_group(distance, T)
        squares += sum_by_group(product_in_tile(distance, distance, T.vec, THREADS), T)
    # the sum of large values has lost digits that the sum of their distances keeps
    shift = moved / count
    mean += shift
    variance = not_negative(squares / count - shift * shift)
    rstd = group_rstd(variance, as_scalar(eps, ACC), ACC)
    store_rows(stats_ptr, groups_of(first, g, T), groups, mean, rstd)
    for k in tl.static_range(TILES):
        offs, mask, channel, group = vectors(first, k, g, T)
        affine = affine_of(channel, first + group, mean, rstd, weight_ptr, bias_ptr, g, T, ACC)
        y = affine.scale * (tiles[k].to(ACC) - affine.mean) + affine.shift
        if residual_ptr is not None:
            y += read(residual_ptr + base + offs, mask).to(ACC)
        activated = activate(y, ACT).to(y_ptr.dtype.element_ty)
        write(y_ptr + base + offs, activated, mask)
        if relu_mask_ptr is not None:
            tl.store(relu_mask_ptr + base // 8 + byte_of(offs), pack(y > 0), mask=mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def group_norm_gradients_kernel(
    dy_ptr, x_ptr, dx_ptr, stats_ptr, weight_ptr, sums_ptr, bias_ptr, relu_mask_ptr, dresidual_ptr,
    groups, group_size, inner_v, groups_per_sample,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """sums, if given, receives what each sample adds to dgamma and dbeta, [samples, 2, channels]. The formula
    of dx is at group_norm_dx_coeffs. ACT may only be an activation whose slope is 0 or 1: dy times its slope
    takes no more bits than dy, and there are no registers for more (others take two passes)."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    TILES: tl.constexpr = T.tiles
    g = GroupGeometry(groups, group_size, inner_v, groups_per_sample)
    first = tl.program_id(0) * T.groups
    base = tl.cast(first, tl.int64) * group_size * (tl.cast(inner_v, tl.int64) * T.vec)
    xs = ()
    dys = ()
    for k in tl.static_range(TILES):
        offs, mask, _, _ = vectors(first, k, g, T)
        dys = dys + (read(dy_ptr + base + offs, mask),)
        xs = xs + (read(x_ptr + base + offs, mask),)
    mine = groups_of(first, g, T)
    mean, rstd = load_row(stats_ptr, 0, mine, groups), load_row(stats_ptr, 1, mine, groups)
    sum_wdy = tl.full((T.groups,), 0.0, ACC)
    sum_wdy_xmu = tl.full((T.groups,), 0.0, ACC)
    channel_dy = tl.full((T.groups * T.channels,), 0.0, ACC)
    channel_dy_xmu = tl.full((T.groups * T.channels,), 0.0, ACC)
    tl.static_assert(ACT.name == "none" or ACT.name == "relu" or ACT.name == "relu6")
    masked = ()
    for k in tl.static_range(TILES):
        offs, mask, channel, group = vectors(first, k, g, T)
        grad = dys[k].to(ACC)  # 0 where the mask is not set
        if ACT.name != "none":
            affine = affine_of(channel, first + group, mean, rstd, weight_ptr, bias_ptr, g, T, ACC)
            grad = through_activation(dys[k], xs[k], affine, relu_mask_ptr, base, offs, mask, ACT, ACC)
            masked = masked + (grad.to(dy_ptr.dtype.element_ty),)
        else:
            masked = masked + (dys[k],)
        if dresidual_ptr is not None:
            write(dresidual_ptr + base + offs, grad, mask, "")
        channel_dy += sum_by_channel(grad, T)
        distance = xs[k].to(ACC) - by_row(mean, T)
        channel_dy_xmu += sum_by_channel(product_in_tile(grad, distance, T.vec, THREADS), T)
        if k % T.pieces == T.pieces - 1:
            index = first + group
            offs_c = index % groups_per_sample * group_size + channel
            exists = (channel < group_size) & (index < groups)
            weight = load_or(weight_ptr, offs_c, exists, 1.0, ACC)
            sum_wdy += tl.sum(tl.reshape(product(weight, channel_dy), (T.groups, T.channels)), 1)
            sum_wdy_xmu += tl.sum(tl.reshape(product(weight, channel_dy_xmu), (T.groups, T.channels)), 1)
            if sums_ptr is not None:
                channels = groups_per_sample * group_size
                to_ptr = sums_ptr + tl.cast(index // groups_per_sample, tl.int64) * (2 * channels) + offs_c
                tl.store(to_ptr, by_channel(rstd, T) * channel_dy_xmu, mask=exists)
                tl.store(to_ptr + channels, channel_dy, mask=exists)
            channel_dy = tl.full((T.groups * T.channels,), 0.0, ACC)
            channel_dy_xmu = tl.full((T.groups * T.channels,), 0.0, ACC)
    count = as_scalar(1.0, ACC) * group_size * inner_v * T.vec
    c_xmu, c_one = group_norm_dx_coeffs(rstd, GradientSums(sum_wdy, sum_wdy_xmu), count)
    for k in tl.static_range(TILES):
        offs, mask, channel, group = vectors(first, k, g, T)
        affine = affine_of(channel, first + group, mean, rstd, weight_ptr, None, g, T, ACC)
        distance = xs[k].to(ACC) - affine.mean
        dx = affine.scale * masked[k].to(ACC) + by_row(c_xmu, T) * distance + by_row(c_one, T)
        write(dx_ptr + base + offs, dx, mask)
