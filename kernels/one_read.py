"""Cells that a program can hold: contiguous groups of channels within a sample, each read once and kept in
registers, forward and backward.

A program takes the cells of a CellTile (one, unless they are tiny), as `tiles` tiles of one 16-byte vector a
thread, so that all of its loads are under way at once and 16-bit data stays packed until it is used. What is
left of a tile where sizes are no powers of two is masked: it costs registers, not traffic."""

import triton
import triton.language as tl

from .activations import Affine, activate, before_activation, pack, unpack
from .geometry import as_scalar
from .moments import not_negative, product, product_in_tile
from .normalizers.common import GradientSums, load_or
from .normalizers.group_norm import cell_rstd, slopes
from .records import CellGeometry

SIZES = list(CellGeometry._fields)
PARAMETERS = ["weight_ptr", "bias_ptr"]
THREADS = tl.constexpr(128)  # of the smallest program: see cell_plan.py


@triton.jit
def vectors(first, K: tl.constexpr, g, T: tl.constexpr):
    """Tile K of the cells from `first` on: element offsets [rows, vec] from the first cell's start, mask
    [rows, 1], and (channel in its cell, cell - first) of each of the tile's groups * channels channels."""
    row = tl.arange(0, T.rows)
    channel = (row // T.span) % T.channels + (K // T.pieces) * T.channels
    cell = row // (T.span * T.channels)
    vector = row % T.span + (K % T.pieces) * T.span
    mask = (channel < g.group) & (vector < g.inner_v) & (first + cell < g.cells)
    start = ((cell * g.group + channel) * g.inner_v + vector) * T.vec
    lane = tl.arange(0, T.groups * T.channels)
    return (
        start[:, None] + tl.arange(0, T.vec)[None, :],
        mask[:, None],
        lane % T.channels + (K // T.pieces) * T.channels,
        lane // T.channels,
    )


@triton.jit
def sum_by_channel(values, CHANNELS: tl.constexpr, SPAN: tl.constexpr):
    """[rows, VEC] -> [CHANNELS]."""
    return tl.sum(tl.reshape(tl.sum(values, 1), (CHANNELS, SPAN)), 1)


@triton.jit
def byte_of(offs):
    """Where the signs of each vector of 8 elements are: [rows, 1]."""
    tl.static_assert(offs.shape[1] == 8)
    return tl.min(offs, 1)[:, None] // 8


@triton.jit
def held_gradient(g, x, k, signs_ptr, base, offs, mask, ACT: tl.constexpr, ACC: tl.constexpr):
    """dy of a tile -> the gradient of what the activation was applied to."""
    if signs_ptr is not None:
        signs = tl.load(signs_ptr + base // 8 + byte_of(offs), mask=mask, other=0)
        g = tl.where(unpack(signs), g, 0.0).to(ACC)
    else:
        g = before_activation(g, x, k, None, offs, mask, ACT, ACC)
    return g


@triton.jit
def by_row(values, ROWS: tl.constexpr):
    """What is known of each cell or channel, for each row of a tile: [ROWS, 1]."""
    SHARE: tl.constexpr = ROWS // values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], (values.shape[0], SHARE)), (ROWS, 1))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def group_norm_kernel(
    x_ptr, y_ptr, table_ptr, weight_ptr, bias_ptr, z_ptr, signs_ptr,
    eps: tl.float64,
    cells, group, inner_v, in_sample,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """table: [2, cells] mean and rstd. in_sample: cells a sample. z, signs (with vec 8 only), ACT:
    as in transform.py."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = T.rows
    TILES: tl.constexpr = T.tiles
    GROUPS: tl.constexpr = T.groups
    CHANNELS: tl.constexpr = T.channels
    SPAN: tl.constexpr = T.span
    g = CellGeometry(cells, group, inner_v, in_sample)
    first = tl.program_id(0) * GROUPS
    base = tl.cast(first, tl.int64) * group * (tl.cast(inner_v, tl.int64) * T.vec)
    held = ()
    total = tl.zeros((GROUPS,), ACC)
    for k in tl.static_range(TILES):
        offs, mask, _, _ = vectors(first, k, g, T)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first")
        held = held + (x,)
    for k in tl.static_range(TILES):
        total += sum_by_channel(held[k].to(ACC), GROUPS, CHANNELS * SPAN)
    count = as_scalar(1.0, ACC) * group * inner_v * T.vec
    mean = total / count
    moved = tl.zeros((GROUPS,), ACC)
    squares = tl.zeros((GROUPS,), ACC)
    for k in tl.static_range(TILES):
        _, mask, _, _ = vectors(first, k, g, T)
        distance = tl.where(mask, held[k].to(ACC) - by_row(mean, ROWS), 0.0)
        moved += sum_by_channel(distance, GROUPS, CHANNELS * SPAN)
        squares += sum_by_channel(
            product_in_tile(distance, distance, T.vec, THREADS), GROUPS, CHANNELS * SPAN
        )  # fmt: skip
    # the sum of large values has lost digits that the sum of their distances has
    shift = moved / count
    mean += shift
    variance = not_negative(squares / count - shift * shift)
    rstd = cell_rstd(variance, as_scalar(eps, ACC), ACC)
    offs_cell = first + tl.arange(0, GROUPS)
    tl.store(table_ptr + offs_cell, mean, mask=offs_cell < cells)
    tl.store(table_ptr + cells + offs_cell, rstd, mask=offs_cell < cells)
    for k in tl.static_range(TILES):
        offs, mask, channel, cell = vectors(first, k, g, T)
        offs_c = (first + cell) % in_sample * group + channel
        there = channel < group
        a = by_row(load_or(weight_ptr, offs_c, there, 1.0, ACC), ROWS) * by_row(rstd, ROWS)
        b = by_row(load_or(bias_ptr, offs_c, there, 0.0, ACC), ROWS)
        y = a * (held[k].to(ACC) - by_row(mean, ROWS)) + b
        if z_ptr is not None:
            y += tl.load(z_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        activated = activate(y, ACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + base + offs, activated, mask=mask, eviction_policy="evict_first")
        if signs_ptr is not None:
            tl.store(signs_ptr + base // 8 + byte_of(offs), pack(y > 0), mask=mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def group_norm_gradients_kernel(
    dy_ptr, x_ptr, dx_ptr, table_ptr, weight_ptr, sums_ptr, bias_ptr, signs_ptr, dz_ptr,
    cells, group, inner_v, in_sample,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """sums, where given: [samples, 2, channels], what each sample adds to dgamma and dbeta. dx: see `slopes`.
    Of activations only those whose slope is 0 or 1: dy times it takes no more bits than dy, and there is no
    room for more (others are swept: see group_norm.py)."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = T.rows
    TILES: tl.constexpr = T.tiles
    GROUPS: tl.constexpr = T.groups
    CHANNELS: tl.constexpr = T.channels
    SPAN: tl.constexpr = T.span
    g = CellGeometry(cells, group, inner_v, in_sample)
    first = tl.program_id(0) * GROUPS
    base = tl.cast(first, tl.int64) * group * (tl.cast(inner_v, tl.int64) * T.vec)
    xs = ()
    gs = ()
    for k in tl.static_range(TILES):
        offs, mask, _, _ = vectors(first, k, g, T)
        gs = gs + (tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first"),)
        xs = xs + (tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first"),)
    offs_cell = first + tl.arange(0, GROUPS)
    mean = tl.load(table_ptr + offs_cell, mask=offs_cell < cells, other=0.0)
    rstd = tl.load(table_ptr + cells + offs_cell, mask=offs_cell < cells, other=0.0)
    sum_wg = tl.zeros((GROUPS,), ACC)
    sum_wgd = tl.zeros((GROUPS,), ACC)
    channel_g = tl.zeros((GROUPS * CHANNELS,), ACC)
    channel_gd = tl.zeros((GROUPS * CHANNELS,), ACC)
    tl.static_assert(ACT.name == "none" or ACT.name == "relu" or ACT.name == "relu6")
    masked = ()
    for k in tl.static_range(TILES):
        offs, mask, channel, cell = vectors(first, k, g, T)
        grad = gs[k].to(ACC)  # 0 where there is nothing
        if ACT.name != "none":
            offs_c = (first + cell) % in_sample * group + channel
            a = by_row(load_or(weight_ptr, offs_c, channel < group, 1.0, ACC), ROWS) * by_row(rstd, ROWS)
            b = by_row(load_or(bias_ptr, offs_c, channel < group, 0.0, ACC), ROWS)
            grad = held_gradient(
                gs[k], xs[k], Affine(by_row(mean, ROWS), a, b), signs_ptr, base, offs, mask, ACT, ACC
            )
            masked = masked + (grad.to(dy_ptr.dtype.element_ty),)
        else:
            masked = masked + (gs[k],)
        if dz_ptr is not None:
            tl.store(dz_ptr + base + offs, grad.to(dz_ptr.dtype.element_ty), mask=mask)
        channel_g += sum_by_channel(grad, GROUPS * CHANNELS, SPAN)
        distance = xs[k].to(ACC) - by_row(mean, ROWS)
        channel_gd += sum_by_channel(product_in_tile(grad, distance, T.vec, THREADS), GROUPS * CHANNELS, SPAN)
        if k % T.pieces == T.pieces - 1:
            whole = first + cell
            offs_c = whole % in_sample * group + channel
            there = (channel < group) & (whole < cells)
            weight = load_or(weight_ptr, offs_c, there, 1.0, ACC)
            sum_wg += tl.sum(tl.reshape(product(weight, channel_g), (GROUPS, CHANNELS)), 1)
            sum_wgd += tl.sum(tl.reshape(product(weight, channel_gd), (GROUPS, CHANNELS)), 1)
            if sums_ptr is not None:
                channels = in_sample * group
                to_ptr = sums_ptr + tl.cast(whole // in_sample, tl.int64) * (2 * channels) + offs_c
                tl.store(to_ptr, by_channel(rstd, GROUPS * CHANNELS) * channel_gd, mask=there)
                tl.store(to_ptr + channels, channel_g, mask=there)
            channel_g = tl.zeros((GROUPS * CHANNELS,), ACC)
            channel_gd = tl.zeros((GROUPS * CHANNELS,), ACC)
    count = as_scalar(1.0, ACC) * group * inner_v * T.vec
    k2, k3 = slopes(rstd, GradientSums(sum_wg, sum_wgd), count)
    for k in tl.static_range(TILES):
        offs, mask, channel, cell = vectors(first, k, g, T)
        weight = load_or(weight_ptr, (first + cell) % in_sample * group + channel, channel < group, 1.0, ACC)
        distance = xs[k].to(ACC) - by_row(mean, ROWS)
        k1 = by_row(weight, ROWS) * by_row(rstd, ROWS)
        dx = k1 * masked[k].to(ACC) + by_row(k2, ROWS) * distance + by_row(k3, ROWS)
        tl.store(
            dx_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
        )  # fmt: skip


@triton.jit
def by_channel(values, CHANNELS: tl.constexpr):
    """[cells] -> [CHANNELS], a cell's channels one after another."""
    SHARE: tl.constexpr = CHANNELS // values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], (values.shape[0], SHARE)), (CHANNELS,))
