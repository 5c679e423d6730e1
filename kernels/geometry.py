"""How a program walks x: one view of memory for every layout.

x is seen as a matrix of `rows` rows, `pitch` elements apart. A *block* is a strip of `width` neighbouring
elements of each row; a *tile* is the part of a block that a program loads at once, [U * R, LANES]. Program
(block, split) visits the tiles split, split + splits, split + 2 * splits ... so that all programs move
through memory as one front.

Two addressings, each with a variant for the shapes that do not fit it:

    ROWS    x is [N*S, C] (channels_last, 2-D input). A lane is a channel.
    CYCLES  the same with C not divisible by a 16-byte vector: several rows are taken as one, lane p holds
            channel p % C.
    PLANES  x is [N, C*S] (contiguous). A block is a strip of a sample's plane, lane p of the plane holds
            channel p // S.
    RUNS    x is [N, C*S] and S is larger than a tile: a block is one channel, a row one piece of its S
            positions.

BatchNorm's cells (sets of elements that share statistics) span all samples, so that all of x is one matrix.
Where a cell lies within a sample, as GroupNorm's, each sample is a matrix of its own with N = 1, and a
program is (sample, block, split).

Every quantity that decides alignment (pitch, width) comes in units of VEC elements and is multiplied here:
Triton then proves the divisibility that 16-byte loads need, whatever the number (it specialises integers on
16 only). The multiplication comes last: since 3.8, what comes out of a tl.where is divisible by nothing."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Block(NamedTuple):
    """A tile's addresses: its elements are base + offs where mask holds."""

    base: Any  # int64
    offs: Any  # [tile_rows, lanes]
    mask: Any
    size: Any  # how much of it exists: rows ("rows", "planes") or elements ("cycles", "runs")


@triton.jit
def as_scalar(value, DTYPE: tl.constexpr):
    """A float argument in the accumulator's type. (Arguments are fp64: Inductor passes Python floats so,
    and fp64 needs it.)
    """
    return tl.full((1,), value, DTYPE)


@triton.jit
def place(program, g):
    """(block, split, sample) of a program. Cells that span samples, as BatchNorm's, know a single one."""
    return program % g.blocks, (program // g.blocks) % g.splits, program // (g.blocks * g.splits)


@triton.jit
def start_of(sample, g, T: tl.constexpr):
    """Where a sample begins, in elements."""
    return tl.cast(sample, tl.int64) * (tl.cast(g.total_v, tl.int64) * T.vec)


@triton.jit
def lanes_and_channels(block, g, T: tl.constexpr):
    """Which channel each lane of a block holds: (offs_c, mask_c) of every step-th lane, or [1] where a
    block is one channel."""
    if T.mode == "runs":
        offs_c = block + tl.arange(0, 1)
        mask_c = offs_c < g.channels
    else:
        lane = tl.arange(0, T.lanes // T.step) * T.step
        position = block * (g.width_v * T.vec) + lane
        mask_c = (lane < g.width_v * T.vec) & (position < g.pitch_v * T.vec)
        if T.mode == "rows":
            offs_c = position
        elif T.mode == "cycles":
            offs_c = position % g.channels
        else:
            offs_c = position // g.inner
    return offs_c, mask_c


@triton.jit
def by_lane(values, T: tl.constexpr):
    """What is known of every step-th lane (or, [1], of all) as a row: [1, lanes] or [1, 1]."""
    if T.step > 1 and values.shape[0] > 1:
        wide = tl.broadcast_to(values[:, None], (T.lanes // T.step, T.step))
        row = tl.reshape(wide, (1, T.lanes))
    else:
        row = values[None, :]
    return row


@triton.jit
def tile(block, index, g, T: tl.constexpr, WHOLE: tl.constexpr = False, BITS: tl.constexpr = False):
    """Tile `index` of a block, as a Block. WHOLE: the caller knows that it is not the block's last, so that
    all its rows are there (in runs the last piece is short all the same). BITS: of the bytes that hold a bit
    for each element of the tile: the same walk over memory an eighth as large. There are bits only where
    everything that an address is made of is a multiple of 8 elements: views.packs."""
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
    if T.mode == "runs":
        # A tile is ROWS consecutive pieces; the plan keeps ROWS <= pieces, so it enters at most one new
        # sample.
        sample = first // g.pieces
        piece = first - sample * g.pieces
        wraps = piece + row >= g.pieces
        all_pieces_v = tl.cast(g.pieces, tl.int64) * (LANES // VEC)
        short_v = (all_pieces_v - width_v).to(tl.int32)  # what the last piece of a run lacks
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
        if WHOLE:
            mask = tl.broadcast_to(mask, (ROWS, LANES))
        else:
            mask = mask & (row < left)
        size = left
        if T.mode == "cycles" and WHOLE:
            size = left * (pitch_v * VEC)
        elif T.mode == "cycles":  # the last row may be short
            elements = tl.minimum(tl.cast(total_v, tl.int64) * VEC - base, ROWS * wide_pitch).to(tl.int32)
            mask = mask & (offs < (elements // VEC) * VEC)
            size = elements
    return Block(base, offs, mask, size)


@triton.jit
def channels_held(g, T: tl.constexpr):
    """How many channels a block is answerable for."""
    if T.mode == "runs":
        held = 1
    elif T.mode == "cycles":
        held = g.channels
    elif T.mode == "rows":
        held = g.width_v * T.vec
    else:
        held = (g.width_v * T.vec) // g.inner
    return held


@triton.jit
def channels_of_block(block, k, held, g):
    """The k-th channels of a block, which holds so many: (offs_c, mask_c), as wide as k."""
    offs_c = block * held + k
    return offs_c, (k < held) & (offs_c < g.channels)


@triton.jit
def values_a_channel(size, g, T: tl.constexpr):
    """What a Block's size means for each channel of the block."""
    if T.mode == "planes":
        count = size * g.inner
    elif T.mode == "cycles":
        count = size // g.channels
    else:
        count = size
    return count


@triton.jit
def sum_by_channel(values, offs_k, g, T: tl.constexpr):
    """[lanes] -> the sums of the block's offs_k-th channels, as wide as offs_k. Lanes that hold nothing are
    left out."""
    FOLD: tl.constexpr = offs_k.shape[0]
    if T.mode == "rows":
        sums = values
    elif FOLD == 1 and T.positions == T.lanes:  # the whole block is one channel
        if T.mode == "planes":
            values = tl.where(tl.arange(0, T.lanes) < g.width_v * T.vec, values, 0.0)
        sums = tl.sum(values[None, :], 1)
    else:
        k, j = offs_k[:, None], tl.arange(0, T.positions)[None, :]
        if T.mode == "planes":
            lane = k * g.inner + j
            mask = (j < g.inner) & (lane < g.width_v * T.vec)
        else:
            lane = j * g.channels + k
            mask = (k < g.channels) & (lane < g.width_v * T.vec)
        gathered = tl.gather(values, tl.reshape(tl.where(mask, lane, 0), (FOLD * T.positions,)), 0)
        sums = tl.sum(tl.where(mask, tl.reshape(gathered, (FOLD, T.positions)), 0.0), 1)
    return sums
