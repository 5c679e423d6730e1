"""The kernels that reduce x channel by channel, for any normalizer (see normalizers/common.py).

statistics_kernel, the first launch of a forward: x -> count, mean and M2 of every channel -> stats. It
reads x once. gradient_sums_kernel, the first launch of a backward: dy and x -> the sums of dy and of dy *
(x - mean) -> the parameters' gradients and the coefficients of dx. It reads dy and x once.

With an activation, dy stands for dy times the activation's slope at scale * (x - mean) + shift + residual,
which is recomputed from x."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import Affine, before_activation, unpack
from .geometry import (
    by_lane,
    channels_of_block,
    channels_per_block,
    few_by_lane,
    lanes_and_channels,
    place,
    start_of,
    sum_by_channel,
    sum_rows,
    tile,
    values_per_channel,
)
from .memory import let_next_launch_start, load_shared, read, store_rows, write
from .moments import (
    Moments,
    finite_or_zero,
    from_pivoted_sums,
    load_channels,
    merge,
    merge_along,
    no_moments,
    product,
)
from .normalizers.common import Gradients, GradientSums, Options, Parameters, Workspace, is_last_program
from .records import Geometry

# The caller's tensors, which may be slices at any offset. One element a lane is read, so alignment does not
# matter.
PARAMETERS = ["weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr", "batches_ptr"]
SIZES = list(Geometry._fields)


class PivotedSums(NamedTuple):
    """Sums of x - pivot and of its square, as sum_rows returns them: for each lane, or each channel."""

    seen: Any  # how much of x is in them, in the unit of Block.size
    pivot: Any
    total: Any
    squares: Any


@triton.jit
def pivoted_sums(raw, mask, pivot, T: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr):
    """Sums over a tile's loads of x - pivot and of its square, [rows, lanes] each. The tile is loaded flat
    and reshaped, because Triton 3.6 spills on a 3-D load.

    RAGGED: some rows are out of bounds and must be masked. Lanes wholly out of bounds may hold any value;
    they are never read."""
    distance = tl.reshape(raw, (T.unroll, T.rows, T.lanes)).to(ACC) - pivot[None, None, :]
    if RAGGED:
        distance = tl.where(tl.reshape(mask, (T.unroll, T.rows, T.lanes)), distance, 0.0)
    return tl.sum(distance, 0), tl.sum(product_of_loads(distance, distance, T), 0)


@triton.jit
def product_of_loads(a, b, T: tl.constexpr):
    """a * b, [unroll, rows, lanes], to be summed: see moments.product. Several loads are summed in a thread
    first, and so are tiles."""
    if T.held and T.unroll == 1:
        result = product(a, b)
    else:
        result = a * b
    return result


@triton.jit
def pivots(sums, size, g, T: tl.constexpr):
    """The mean of each lane's channel in one tile, from what sum_rows returns, twice: of its shape, and to
    be subtracted from lanes, [lanes], or [1] if a block is one channel.

    Any fixed choice of a pivot fails on some data: x[0] may be a padded zero or a spike, and running_mean may
    be NaN for good."""
    count = tl.full((1,), values_per_channel(size, g, T), sums.dtype)
    if T.mode == "nhwc" or T.one_channel or T.few_channels:
        pivot = sums / count
    else:
        lane = tl.arange(0, T.lanes)
        k = lane // g.inner if T.mode == "nchw_packed" else lane % g.channels
        pivot = tl.full((T.lanes,), 0.0, sums.dtype)
        for start in tl.range(0, channels_per_block(g, T), T.channels_per_iter):
            offs_k = start + tl.arange(0, T.channels_per_iter)
            means = sum_by_channel(sums, offs_k, g, T) / count
            here = (k >= start) & (k < start + T.channels_per_iter)
            pivot = tl.where(here, tl.gather(means, tl.where(here, k - start, 0), 0), pivot)
    pivot = finite_or_zero(pivot)
    return pivot, few_by_lane(pivot, g, T) if T.few_channels else pivot


@triton.jit
def sums_by_lane(x_ptr, block, split, g, T: tl.constexpr, ACC: tl.constexpr):
    """PivotedSums over one program's tiles, and the last of these tiles, as loaded."""
    # Only the block's last tile may lack rows. Its program takes it first, outside the loop, so that the loop
    # needs no mask of rows: there are fewer predicate registers than loads in flight.
    last = split + (g.tiles - 1 - split) // g.splits * g.splits
    t = tile(block, last, g, T)
    seen = t.size
    # evict_last: the second launch reads x again, backwards, and finds its end in L2
    raw = tl.load(x_ptr + t.base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_last")
    sums = sum_rows(tl.sum(tl.reshape(raw, (T.unroll, T.rows, T.lanes)).to(ACC), 0), g, T)
    pivot, lane_pivot = pivots(sums, seen, g, T)
    total, squares = pivoted_sums(raw, t.mask, lane_pivot, T, True, ACC)
    if not T.held:
        for index in tl.range(split, last, g.splits):
            t = tile(block, index, g, T, True)
            more = tl.load(x_ptr + t.base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_last")
            more_total, more_squares = pivoted_sums(more, t.mask, lane_pivot, T, T.mode == "nchw", ACC)
            total += more_total
            squares += more_squares
            seen += t.size
    return PivotedSums(seen, pivot, sum_rows(total, g, T), sum_rows(squares, g, T)), raw


@triton.jit
def moments_of_channels(sums, offs_k, c, g, T: tl.constexpr):
    """The Moments of a block's offs_k-th channels, c, from the sums of its lanes."""
    channel_total = sum_by_channel(sums.total, offs_k, g, T)
    channel_squares = sum_by_channel(sums.squares, offs_k, g, T)
    if T.mode == "nhwc" or T.one_channel or T.few_channels:
        channel_pivot = sums.pivot
    else:  # any lane of the channel will do
        first = offs_k * g.inner if T.mode == "nchw_packed" else offs_k
        channel_pivot = tl.gather(sums.pivot, tl.where(c.mask, first, 0), 0)
    count = tl.full((1,), values_per_channel(sums.seen, g, T), sums.total.dtype)
    shift, m2 = from_pivoted_sums(count, channel_total, channel_squares)
    return Moments(count, channel_pivot, shift, m2)


@triton.jit
def store_moments(mine_ptr, block, sums, g, T: tl.constexpr):
    """Reduces lanes to channels and stores them, channels_per_iter at a time: all at once would need too many
    registers."""
    count_c = channels_per_block(g, T)
    for start in tl.range(0, count_c, T.channels_per_iter):
        offs_k = start + tl.arange(0, T.channels_per_iter)
        c = channels_of_block(block, offs_k, count_c, g)
        m = moments_of_channels(sums, offs_k, c, g, T)
        store_rows(mine_ptr, c, g.channels, m.pivot, m.shift, m.m2)


@triton.jit
def merge_moments(sample_ptr, counts_ptr, c, g, T: tl.constexpr, ACC: tl.constexpr):
    """The Moments of a block's channels, merged from all of its programs: partials_per_iter of them at a
    time, element by element, and along that axis only at the end, so that the loop has no cross-warp
    step. It waits for the loads of several iterations at once."""
    AHEAD: tl.constexpr = T.iters_in_flight
    found = no_moments(T.partials_per_iter, T.channels, ACC)
    for start in tl.range(0, g.splits, T.partials_per_iter * AHEAD):
        theirs = ()
        for k in tl.static_range(AHEAD):
            offs_s = start + k * T.partials_per_iter + tl.arange(0, T.partials_per_iter)[:, None]
            mask = (offs_s < g.splits) & c.mask[None, :]
            theirs_ptr = sample_ptr + tl.cast(offs_s, tl.int64) * (3 * g.channels) + c.offs[None, :]
            pivot, shift, m2 = load_channels(theirs_ptr, mask, g)
            count = load_shared(counts_ptr + offs_s * g.blocks, offs_s < g.splits)
            count = tl.broadcast_to(count, (T.partials_per_iter, T.channels))
            theirs = theirs + ((count, pivot, shift, m2),)  # in tuples, Triton 3.6 forgets records' names
        for k in tl.static_range(AHEAD):
            found = merge(found, Moments(theirs[k][0], theirs[k][1], theirs[k][2], theirs[k][3]))
    return merge_along(found, 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def statistics_kernel(
    x_ptr, partials_ptr, semaphores_ptr, stats_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    eps: tl.float64, momentum: tl.float64, r_max: tl.float64, d_max: tl.float64,
    warmup: tl.float64, r_steps: tl.float64, d_steps: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups,
    T: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partials, for each sample: pivot, shift and M2, [splits, 3, channels], then counts, [splits, blocks].
    NORM: the Normalizer, whose finalize_forward turns the moments into stats."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups
    )
    params = Parameters(weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr)
    options = Options(eps, momentum, r_max, d_max, warmup, r_steps, d_steps)
    block, split, sample = place(tl.program_id(0), g)
    sums, _ = sums_by_lane(x_ptr + start_of(sample, g, T), block, split, g, T, ACC)
    let_next_launch_start(PDL)
    sample_ptr = partials_ptr + tl.cast(sample, tl.int64) * g.splits * (3 * g.channels + g.blocks)
    store_moments(sample_ptr + tl.cast(split, tl.int64) * (3 * g.channels), block, sums, g, T)
    counts_ptr = sample_ptr + tl.cast(g.splits, tl.int64) * (3 * g.channels) + block
    tl.store(counts_ptr + split * g.blocks, values_per_channel(sums.seen, g, T).to(ACC))
    if is_last_program(semaphores_ptr + sample * g.blocks + block, g.splits):
        c = channels_of_block(block, tl.arange(0, T.channels), channels_per_block(g, T), g)
        if ACC == tl.float32:  # fp64 has no registers for it meanwhile [sass]
            loaded = NORM.load_forward(c, params, ACC)
        m = merge_moments(sample_ptr, counts_ptr, c, g, T, ACC)
        if ACC == tl.float64:
            loaded = NORM.load_forward(c, params, ACC)
        ws = Workspace(sample, sample_ptr, semaphores_ptr, stats_ptr, loaded)
        NORM.finalize_forward(c, m, ws, params, options, g, T, NORM, ACC)


class Sources(NamedTuple):
    """Pointers to what the gradient of a normalized value is made of, and to where it goes, if the residual
    has one; or None."""

    dy: Any
    x: Any
    residual: Any
    relu_mask: Any
    dresidual: Any


@triton.jit
def gradient_tile(
    p, t, block, index, start, affine, g, T: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr
):
    """dy times the activation's slope in tile t, number `index` of a block of the sample that begins at
    `start`, and x. Stores the residual's gradient."""
    base = t.base + start
    grad = tl.load(p.dy + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_last")
    x = tl.load(p.x + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_last")
    if ACT.name != "none" and p.relu_mask is None:
        residual_ptr = None if p.residual is None else p.residual + base
        grad = before_activation(grad, x, affine, residual_ptr, t.offs, t.mask, ACT, ACC)
    elif p.relu_mask is not None:
        if p.relu_mask.dtype.element_ty == tl.uint8:
            bits = tile(block, index, g, T, False, True)
            passes = unpack(read(p.relu_mask + start // 8 + bits.base + bits.offs, bits.mask))
        else:
            passes = read(p.relu_mask + base + t.offs, t.mask)
        grad = tl.where(passes, grad, 0.0)
    if p.dresidual is not None:
        tl.store(p.dresidual + base + t.offs, grad.to(p.dresidual.dtype.element_ty), mask=t.mask)
    return grad, x


@triton.jit
def gradient_sums_of_tile(grad, x, mean, T: tl.constexpr, ACC: tl.constexpr):
    """Sums over a tile's loads of the gradient and of its product with x - mean, [rows, lanes] each."""
    grad = tl.reshape(grad, (T.unroll, T.rows, T.lanes)).to(ACC)
    distance = tl.reshape(x, (T.unroll, T.rows, T.lanes)).to(ACC) - mean[None, :, :]
    return tl.sum(grad, 0), tl.sum(product_of_loads(grad, distance, T), 0)


@triton.jit
def merge_gradient_sums(sample_ptr, c, g, T: tl.constexpr, ACC: tl.constexpr):
    """The GradientSums of a block's channels, added up over all of its programs."""
    AHEAD: tl.constexpr = T.iters_in_flight
    all_dy = tl.full((T.partials_per_iter, T.channels), 0.0, ACC)
    all_dy_xmu = tl.full((T.partials_per_iter, T.channels), 0.0, ACC)
    for start in tl.range(0, g.splits, T.partials_per_iter * AHEAD):
        theirs = ()
        for k in tl.static_range(AHEAD):
            offs_s = start + k * T.partials_per_iter + tl.arange(0, T.partials_per_iter)[:, None]
            mask = (offs_s < g.splits) & c.mask[None, :]
            theirs_ptr = sample_ptr + tl.cast(offs_s, tl.int64) * (2 * g.channels) + c.offs[None, :]
            theirs = theirs + ((load_shared(theirs_ptr, mask), load_shared(theirs_ptr + g.channels, mask)),)
        for k in tl.static_range(AHEAD):
            all_dy += theirs[k][0]
            all_dy_xmu += theirs[k][1]
    return GradientSums(tl.sum(all_dy, 0), tl.sum(all_dy_xmu, 0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def gradient_sums_kernel(
    dy_ptr, x_ptr, dx_ptr, partials_ptr, semaphores_ptr, stats_ptr, dx_coeffs_ptr, dweight_ptr, dbias_ptr,
    weight_ptr, sums_ptr, bias_ptr, residual_ptr, relu_mask_ptr, dresidual_ptr,
    count: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups,
    T: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partials, for each sample: [splits, 2, channels]. count: the number of values in a group.

    Eval gives dx_ptr (dx = scale * dy needs no sums), training dx_coeffs_ptr. Where groups lie within a
    sample, weight_ptr is given, and sums_ptr, [samples, 2, channels], receives what each sample adds to
    dgamma and dbeta. An activation's slope is found from bias_ptr and residual_ptr, or, for relu with a
    residual, from relu_mask_ptr (see elementwise.py). dresidual_ptr receives dy times that slope."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups
    )
    params = Parameters(weight_ptr, bias_ptr, None, None, None)
    block, split, sample = place(tl.program_id(0), g)
    c = lanes_and_channels(block, g, T)
    mean, scale, shift = NORM.coefficients(c, sample, stats_ptr, params, g, ACC)
    mean, scale, shift = by_lane(mean, T), by_lane(scale, T), by_lane(shift, T)
    affine = Affine(mean, scale, shift)
    sources = Sources(dy_ptr, x_ptr, residual_ptr, relu_mask_ptr, dresidual_ptr)
    sum_dy = tl.full((T.rows, T.lanes), 0.0, ACC)
    sum_dy_xmu = tl.full((T.rows, T.lanes), 0.0, ACC)
    start_element = start_of(sample, g, T)
    for index in tl.range(split, g.tiles, g.splits):
        t = tile(block, index, g, T)
        grad, x = gradient_tile(sources, t, block, index, start_element, affine, g, T, ACT, ACC)
        if dx_ptr is not None:
            dx = scale * grad.to(ACC)
            write(dx_ptr + t.base + start_element + t.offs, dx, t.mask)
        more_dy, more_dy_xmu = gradient_sums_of_tile(grad, x, mean, T, ACC)
        sum_dy += more_dy
        sum_dy_xmu += more_dy_xmu
    let_next_launch_start(PDL)
    sum_dy, sum_dy_xmu = sum_rows(sum_dy, g, T), sum_rows(sum_dy_xmu, g, T)
    count_c = channels_per_block(g, T)
    sample_ptr = partials_ptr + tl.cast(sample, tl.int64) * g.splits * (2 * g.channels)
    mine_ptr = sample_ptr + tl.cast(split, tl.int64) * (2 * g.channels)
    for start in tl.range(0, count_c, T.channels_per_iter):
        offs_k = start + tl.arange(0, T.channels_per_iter)
        done = channels_of_block(block, offs_k, count_c, g)
        channel_dy = sum_by_channel(sum_dy, offs_k, g, T)
        store_rows(mine_ptr, done, g.channels, channel_dy, sum_by_channel(sum_dy_xmu, offs_k, g, T))
    if is_last_program(semaphores_ptr + sample * g.blocks + block, g.splits):
        done = channels_of_block(block, tl.arange(0, T.channels), count_c, g)
        loaded = NORM.load_backward(done, sample, stats_ptr, params, g, ACC)
        sums = merge_gradient_sums(sample_ptr, done, g, T, ACC)
        ws = Workspace(sample, sample_ptr, semaphores_ptr, stats_ptr, loaded)
        out = Gradients(dx_coeffs_ptr, dweight_ptr, dbias_ptr, sums_ptr, count)
        NORM.finalize_backward(done, sums, ws, params, out, g, T, ACC)
