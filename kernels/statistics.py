"""Forward, first launch: x -> (count, mean, M2) of every channel -> the coefficient table. Reads x once."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .geometry import (
    channels_held,
    channels_of_block,
    place,
    start_of,
    sum_by_channel,
    tile,
    values_a_channel,
)
from .moments import (
    Moments,
    finite_or_zero,
    from_pivoted_sums,
    load_channels,
    merge,
    merge_along,
    no_moments,
    store_channels,
)
from .normalizers.common import Channels, Options, Parameters, Workspace, arrive_last
from .records import Geometry

# of the caller, who may have cut them from anywhere: a channel each is loaded as well without alignment
PARAMETERS = ["weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr", "batches_ptr"]
SIZES = list(Geometry._fields)


class PivotedSums(NamedTuple):
    """Of lanes: how much of x they have seen, and sums of x - pivot and its square."""

    seen: Any  # as a Block's size
    pivot: Any
    total: Any
    squares: Any


@triton.jit
def pivoted_sums(raw, mask, pivot, T: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr):
    """Sums over a tile's loads of (x - pivot) and its square: [rows, lanes] each. Loaded flat and reshaped:
    Triton 3.6 spills on a 3-D load.

    RAGGED: some rows of a lane are not there. Lanes that are not there at all may hold anything: nobody
    looks at them."""
    distance = tl.reshape(raw, (T.unroll, T.rows, T.lanes)).to(ACC) - pivot[None, None, :]
    if RAGGED:
        distance = tl.where(tl.reshape(mask, (T.unroll, T.rows, T.lanes)), distance, 0.0)
    return tl.sum(distance, 0), tl.sum(distance * distance, 0)


@triton.jit
def pivot_by_lane(sums, size, g, T: tl.constexpr):
    """The mean of each lane's channel in one tile, from the sums of its lanes: [lanes], or [1] where a
    block is one channel.

    Any fixed choice of a pivot fails on some data: x[0] may be a padded zero or a spike, running_mean may
    be NaN for good."""
    count = tl.full((1,), values_a_channel(size, g, T), sums.dtype)
    if T.mode == "rows" or T.positions == T.lanes:
        pivot = sum_by_channel(sums, tl.arange(0, T.fold), g, T) / count
    else:
        lane = tl.arange(0, T.lanes)
        k = lane // g.inner if T.mode == "planes" else lane % g.channels
        pivot = tl.full((T.lanes,), 0.0, sums.dtype)
        for start in tl.range(0, channels_held(g, T), T.fold):
            offs_k = start + tl.arange(0, T.fold)
            means = sum_by_channel(sums, offs_k, g, T) / count
            here = (k >= start) & (k < start + T.fold)
            pivot = tl.where(here, tl.gather(means, tl.where(here, k - start, 0), 0), pivot)
    return finite_or_zero(pivot)


@triton.jit
def sums_by_lane(x_ptr, block, split, g, T: tl.constexpr, ACC: tl.constexpr):
    """One program's share of x, as PivotedSums of [lanes]."""
    # The block's last tile may lack rows. Its program takes it first, outside the loop, which then needs no
    # test of rows: there are fewer predicate registers than loads to be kept under way.
    last = split + (g.tiles - 1 - split) // g.splits * g.splits
    t = tile(block, last, g, T)
    seen = t.size
    # evict_last: the second launch reads x again, backwards, and finds in L2 what is left of it
    raw = tl.load(x_ptr + t.base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_last")
    sums = tl.sum(tl.sum(tl.reshape(raw, (T.unroll, T.rows, T.lanes)).to(ACC), 0), 0)
    pivot = pivot_by_lane(sums, seen, g, T)
    total, squares = pivoted_sums(raw, t.mask, pivot, T, True, ACC)
    for index in tl.range(split, last, g.splits):
        t = tile(block, index, g, T, True)
        raw = tl.load(x_ptr + t.base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_last")
        more_total, more_squares = pivoted_sums(raw, t.mask, pivot, T, T.mode == "runs", ACC)
        total += more_total
        squares += more_squares
        seen += t.size
    return PivotedSums(seen, pivot, tl.sum(total, 0), tl.sum(squares, 0))


@triton.jit
def store_moments(mine_ptr, block, count, sums, g, T: tl.constexpr):
    """Lanes to channels, and out, fold channels at a time: all at once would need too many registers."""
    held = channels_held(g, T)
    for start in tl.range(0, held, T.fold):
        offs_k = start + tl.arange(0, T.fold)
        offs_c, mask_c = channels_of_block(block, offs_k, held, g)
        channel_total = sum_by_channel(sums.total, offs_k, g, T)
        channel_squares = sum_by_channel(sums.squares, offs_k, g, T)
        if T.mode == "rows" or T.positions == T.lanes:
            channel_pivot = sums.pivot
        else:  # any lane of the channel will do
            first = offs_k * g.inner if T.mode == "planes" else offs_k
            channel_pivot = tl.gather(sums.pivot, tl.where(mask_c, first, 0), 0)
        shift, m2 = from_pivoted_sums(tl.full((1,), count, sums.total.dtype), channel_total, channel_squares)
        store_channels(mine_ptr, offs_c, mask_c, g, channel_pivot, shift, m2)


@triton.jit
def merge_splits(sample_ptr, counts_ptr, c, g, T: tl.constexpr, ACC: tl.constexpr):
    """What all programs of a block found of its channels, as Moments.

    Merged `merge` splits at a time, lane by lane, then along the lanes: no cross-warp step inside the
    loop."""
    found = no_moments(T.merge, T.channels, ACC)
    for start in tl.range(0, g.splits, T.merge):
        offs_s = start + tl.arange(0, T.merge)[:, None]
        mask = (offs_s < g.splits) & c.mask[None, :]
        theirs_ptr = sample_ptr + tl.cast(offs_s, tl.int64) * (3 * g.channels) + c.offs[None, :]
        pivot, shift, m2 = load_channels(theirs_ptr, mask, g)
        count = tl.load(
            counts_ptr + offs_s * g.blocks, mask=offs_s < g.splits, other=0.0, cache_modifier=".cg"
        )
        count = tl.broadcast_to(count, (T.merge, T.channels))
        found = merge(found, Moments(count, pivot, shift, m2))
    return merge_along(found, 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def statistics_kernel(
    x_ptr, partials_ptr, arrivals_ptr, table_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    eps: tl.float64, momentum: tl.float64, r_max: tl.float64, d_max: tl.float64,
    warmup: tl.float64, r_steps: tl.float64, d_steps: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells,
    T: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """partials, of each sample: [splits, 3, channels] pivot, shift and M2, then [splits, blocks] counts.
    NORM: a Normalizer, which makes
    the table of them."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells
    )
    of = Parameters(weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr)
    o = Options(eps, momentum, r_max, d_max, warmup, r_steps, d_steps)
    block, split, sample = place(tl.program_id(0), g)
    sums = sums_by_lane(x_ptr + start_of(sample, g, T), block, split, g, T, ACC)
    count = values_a_channel(sums.seen, g, T)
    sample_ptr = partials_ptr + tl.cast(sample, tl.int64) * g.splits * (3 * g.channels + g.blocks)
    store_moments(sample_ptr + tl.cast(split, tl.int64) * (3 * g.channels), block, count, sums, g, T)
    counts_ptr = sample_ptr + tl.cast(g.splits, tl.int64) * (3 * g.channels) + block
    tl.store(counts_ptr + split * g.blocks, count.to(ACC))
    if arrive_last(arrivals_ptr + sample * g.blocks + block, g.splits):
        offs_c, mask_c = channels_of_block(block, tl.arange(0, T.channels), channels_held(g, T), g)
        c = Channels(offs_c, mask_c)
        m = merge_splits(sample_ptr, counts_ptr, c, g, T, ACC)
        at = Workspace(sample, sample_ptr, arrivals_ptr, table_ptr)
        NORM.finalize_forward(c, m, at, of, o, g, T, NORM, ACC)
