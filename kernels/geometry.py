"""How a program walks over x: one view of memory for every layout.

x is seen as a matrix of `rows` rows, `pitch` elements apart. A *block* is a strip of `width` neighbouring
elements of each row. A *tile* is the part of a block that a program loads at once, [unroll * rows, lanes].
Program (block, split) visits the tiles split, split + splits, split + 2 * splits ... so that all programs
move through memory as one front.

There are two ways to address x, each with a variant for shapes that do not fit it:

    nhwc         x is [N*S, C] (channels_last, 2-D input). A lane is a channel.
    nhwc_packed  The same, where C is not divisible by a 16-byte vector: several rows are taken as one, and
                 lane i holds channel i % C.
    nchw         x is [N, C*S] (contiguous), and S is larger than a tile. A block is one channel, and a row is
                 one piece of its S positions.
    nchw_packed  The same, where S is smaller. A block is a strip of a sample, and element i of a sample
                 belongs to channel i // S.

BatchNorm's groups (sets of elements that share statistics) span all samples, so all of x is one matrix. Where
groups lie within a sample, as GroupNorm's do, each sample is a matrix of its own with N = 1, and a program is
(sample, block, split).

Every quantity that decides alignment (pitch, width) is given in vectors of Tile.vec elements and multiplied
here. Triton then proves the divisibility that 16-byte loads need, whatever the number; it specializes
integers on 16 only. The multiplication comes last, because since Triton 3.8 the result of a tl.where has no
known divisibility."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import Channels


class Block(NamedTuple):
    """The addresses of a tile: base + offs, where mask holds."""

    base: Any  # int64
    offs: Any  # [tile_rows, lanes]
    mask: Any
    size: Any  # how much of it exists: rows (nhwc, nchw_packed) or elements (nhwc_packed, nchw)


@triton.jit
def place(program, g):
    """(block, split, sample) of a program. There is a single sample where groups span samples."""
    return program % g.blocks, (program // g.blocks) % g.splits, program // (g.blocks * g.splits)


@triton.jit
def start_of(sample, g, T: tl.constexpr):
    """The element at which a sample begins."""
    return tl.cast(sample, tl.int64) * (tl.cast(g.total_v, tl.int64) * T.vec)


@triton.jit
def lanes_and_channels(block, g, T: tl.constexpr):
    """The channel of each lane of a block, as Channels: of every channel_align-th lane, or [1] if a block is
    one channel."""
    if T.mode == "nchw":
        offs_c = block + tl.arange(0, 1)
        mask_c = offs_c < g.channels
    else:
        lane = tl.arange(0, T.lanes // T.channel_align) * T.channel_align
        position = block * (g.width_v * T.vec) + lane
        mask_c = (lane < g.width_v * T.vec) & (position < g.pitch_v * T.vec)
        if T.mode == "nhwc":
            offs_c = position
        elif T.mode == "nhwc_packed":
            offs_c = position % g.channels
        else:
            offs_c = position // g.inner
    return Channels(offs_c, mask_c)


@triton.jit
def by_lane(values, T: tl.constexpr):
    """Broadcasts values of every channel_align-th lane, or one value of all, to [1, lanes] or [1, 1]."""
    if T.channel_align > 1 and values.shape[0] > 1:
        wide = tl.broadcast_to(values[:, None], (T.lanes // T.channel_align, T.channel_align))
        row = tl.reshape(wide, (1, T.lanes))
    else:
        row = values[None, :]
    return row


@triton.jit
def tile(block, index, g, T: tl.constexpr, EVEN: tl.constexpr = False, BITS: tl.constexpr = False):
    """Tile `index` of a block, as a Block.

    EVEN: the caller knows that this is not the block's last tile, so all of its rows exist. (In nchw the last
    piece of a channel is short all the same.) BITS: the addresses are of a mask's bytes, one bit for each
    element: the same walk over memory an eighth as large. There are masks only where every part of an address
    is a multiple of 8 elements (views.packs)."""
    ROWS: tl.constexpr = T.tile_rows
    VEC: tl.constexpr = 1 if BITS else T.vec
    LANES: tl.constexpr = T.lanes // 8 if BITS else T.lanes
    pitch_v, width_v, total_v = g.pitch_v, g.width_v, g.total_v
    if BITS:
        pitch_v, width_v = g.pitch_v * T.vec // 8, g.width_v * T.vec // 8
        total_v = tl.cast(g.total_v, tl.int64) * T.vec // 8
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    first = index * ROWS
    left = tl.minimum(g.rows - first, ROWS)
    wide_pitch = tl.cast(pitch_v, tl.int64) * VEC
    wide_width = tl.cast(width_v, tl.int64) * VEC
    if T.mode == "nchw":
        # A tile is ROWS consecutive pieces, and the plan keeps ROWS <= pieces: it enters at most one new
        # sample.
        sample = first // g.pieces
        piece = first - sample * g.pieces
        wraps = piece + row >= g.pieces
        all_pieces_v = tl.cast(g.pieces, tl.int64) * (LANES // VEC)
        short_v = (all_pieces_v - width_v).to(tl.int32)  # what the last piece of a channel lacks
        base = (
            tl.cast(sample, tl.int64) * wide_pitch
            + tl.cast(block, tl.int64) * wide_width
            + tl.cast(piece, tl.int64) * LANES
        )
        offs = row * LANES + lane + tl.where(wraps, pitch_v - all_pieces_v, 0) * VEC
        last = (piece + row == g.pieces - 1) | (piece + row == 2 * g.pieces - 1)
        mask = (row < left) & (lane < (LANES // VEC - tl.where(last, short_v, 0)) * VEC)
        size = (left * (LANES // VEC) - tl.where(piece + left >= g.pieces, short_v, 0)) * VEC
    else:
        start = block * (width_v * VEC)
        base = tl.cast(first, tl.int64) * wide_pitch + start
        offs = row * (pitch_v * VEC) + lane
        mask = (lane < width_v * VEC) & (start + lane < pitch_v * VEC)
        if EVEN:
            mask = tl.broadcast_to(mask, (ROWS, LANES))
        else:
            mask = mask & (row < left)
        size = left
        if T.mode == "nhwc_packed" and EVEN:
            size = left * (pitch_v * VEC)
        elif T.mode == "nhwc_packed":  # the last row may be short
            elements = tl.minimum(tl.cast(total_v, tl.int64) * VEC - base, ROWS * wide_pitch).to(tl.int32)
            mask = mask & (offs < (elements // VEC) * VEC)
            size = elements
    return Block(base, offs, mask, size)


@triton.jit
def channels_per_block(g, T: tl.constexpr):
    """The number of channels that a block reduces."""
    if T.mode == "nchw":
        count = 1
    elif T.mode == "nhwc_packed":
        count = g.channels
    elif T.mode == "nhwc":
        count = g.width_v * T.vec
    else:
        count = (g.width_v * T.vec) // g.inner
    return count


@triton.jit
def channels_of_block(block, k, count, g):
    """The k-th of a block's `count` channels, as Channels of k's shape."""
    offs_c = block * count + k
    return Channels(offs_c, (k < count) & (offs_c < g.channels))


@triton.jit
def values_per_channel(size, g, T: tl.constexpr):
    """The number of values of each channel in a tile or tiles of this size (see Block)."""
    if T.mode == "nchw_packed":
        count = size * g.inner
    elif T.mode == "nhwc_packed":
        count = size // g.channels
    else:
        count = size
    return count


@triton.jit
def has_lane(k, lane, g):
    """Whether channels k of a block in nchw_packed have these lanes."""
    return (lane >= k * g.inner) & (lane < (k + 1) * g.inner)


@triton.jit
def sum_rows(values, g, T: tl.constexpr):
    """[rows, lanes] -> the sums of each lane, [lanes], or of each channel, if a block has few, [channels]."""
    COUNT: tl.constexpr = T.rows * T.lanes
    if T.one_channel:
        if T.mode == "nchw_packed":  # lanes out of bounds may hold anything
            values = tl.where(tl.arange(0, T.lanes)[None, :] < g.width_v * T.vec, values, 0.0)
        sums = tl.sum(tl.reshape(values, (1, COUNT)), 1)
    elif T.few_channels:
        here = has_lane(tl.arange(0, T.channels)[:, None], tl.arange(0, COUNT)[None, :] % T.lanes, g)
        sums = tl.sum(tl.where(here, tl.reshape(values, (1, COUNT)), 0.0), 1)
    else:
        sums = tl.sum(values, 0)
    return sums


@triton.jit
def few_by_lane(values, g, T: tl.constexpr):
    """[channels] -> the value of each lane's channel, [lanes]."""
    here = has_lane(tl.arange(0, T.channels)[:, None], tl.arange(0, T.lanes)[None, :], g)
    return tl.sum(tl.where(here, values[:, None], 0.0), 0)


@triton.jit
def row_of_channels(values, g, T: tl.constexpr):
    """[channels] -> the value of each lane's channel, [1, lanes], or [1, 1] if a block is one channel."""
    if T.mode == "nhwc" or T.one_channel:
        row = values
    elif T.few_channels:
        row = few_by_lane(values, g, T)
    else:
        k = tl.arange(0, T.lanes) // g.inner
        row = tl.gather(values, tl.where(k < T.channels, k, 0), 0)
    return row[None, :]


@triton.jit
def sum_by_channel(values, offs_k, g, T: tl.constexpr):
    """What sum_rows returns -> the sums of the block's offs_k-th channels, of offs_k's shape. Lanes out of
    bounds are left out."""
    COUNT: tl.constexpr = offs_k.shape[0]
    if T.mode == "nhwc" or T.one_channel or T.few_channels:
        sums = values
    else:
        k, j = offs_k[:, None], tl.arange(0, T.lanes_per_channel)[None, :]
        if T.mode == "nchw_packed":
            lane = k * g.inner + j
            mask = (j < g.inner) & (lane < g.width_v * T.vec)
        else:
            lane = j * g.channels + k
            mask = (k < g.channels) & (lane < g.width_v * T.vec)
        gathered = tl.gather(values, tl.reshape(tl.where(mask, lane, 0), (COUNT * T.lanes_per_channel,)), 0)
        sums = tl.sum(tl.where(mask, tl.reshape(gathered, (COUNT, T.lanes_per_channel)), 0.0), 1)
    return sums
