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

import triton
import triton.language as tl

ROWS = tl.constexpr(0)
CYCLES = tl.constexpr(1)
PLANES = tl.constexpr(2)
RUNS = tl.constexpr(3)


@triton.jit
def as_scalar(value, DTYPE: tl.constexpr):
    """A float argument in the accumulator's type. (Arguments are fp64: Inductor passes Python floats so,
    and fp64 needs it.)
    """
    return tl.full((1,), value, DTYPE)


@triton.jit
def place(program, blocks, splits):
    """(block, split, sample) of a program. Cells that span samples, as BatchNorm's, know a single one."""
    return program % blocks, (program // blocks) % splits, program // (blocks * splits)


@triton.jit
def start_of(sample, total_v, VEC: tl.constexpr):
    """Where a sample begins, in elements."""
    return tl.cast(sample, tl.int64) * (tl.cast(total_v, tl.int64) * VEC)


@triton.jit
def lanes_and_channels(
    block, pitch_v, width_v, inner, channels,
    MODE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Which channel each lane of a block holds: (offs_c, mask_c) of every STEP-th lane, or [1] where a
    block is one channel. STEP > 1 promises that channels begin on multiples of it."""
    if MODE == RUNS:
        offs_c = block + tl.arange(0, 1)
        mask_c = offs_c < channels
    else:
        lane = tl.arange(0, LANES // STEP) * STEP
        position = block * (width_v * VEC) + lane
        mask_c = (lane < width_v * VEC) & (position < pitch_v * VEC)
        if MODE == ROWS:
            offs_c = position
        elif MODE == CYCLES:
            offs_c = position % channels
        else:
            offs_c = position // inner
    return offs_c, mask_c


@triton.jit
def by_lane(values, LANES: tl.constexpr, STEP: tl.constexpr):
    """What is known of every STEP-th lane (or, [1], of all) as a row: [1, LANES] or [1, 1]."""
    if STEP > 1 and values.shape[0] > 1:
        wide = tl.broadcast_to(values[:, None], (LANES // STEP, STEP))
        row = tl.reshape(wide, (1, LANES))
    else:
        row = values[None, :]
    return row


@triton.jit
def tile(
    block,
    index,
    rows,
    pitch_v,
    width_v,
    pieces,
    total_v,
    MODE: tl.constexpr,
    VEC: tl.constexpr,
    ROWS_A_TILE: tl.constexpr,
    LANES: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Tile `index` of a block: (base, offs, mask, size). WHOLE: the caller knows that it is not the block's
    last, so that all its rows are there (in RUNS the last piece of a run is short all the same).

    base: int64 element offset of the tile; offs, mask: [ROWS_A_TILE, LANES]; size: how much of it exists,
    counted in rows (ROWS, PLANES) or in elements (CYCLES, RUNS). pieces: rows that one sample's run of S
    positions is cut into (RUNS)."""
    row = tl.arange(0, ROWS_A_TILE)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    first = index * ROWS_A_TILE
    left = tl.minimum(rows - first, ROWS_A_TILE)
    wide_pitch = tl.cast(pitch_v, tl.int64) * VEC
    wide_width = tl.cast(width_v, tl.int64) * VEC
    if MODE == RUNS:
        # A tile is ROWS_A_TILE consecutive pieces; the plan keeps ROWS_A_TILE <= pieces, so it enters at
        # most one new sample.
        sample = first // pieces
        piece = first - sample * pieces
        wraps = piece + row >= pieces
        all_pieces_v = tl.cast(pieces, tl.int64) * (LANES // VEC)
        short_v = (all_pieces_v - width_v).to(tl.int32)  # what the last piece of a run lacks
        base = (
            tl.cast(sample, tl.int64) * wide_pitch
            + tl.cast(block, tl.int64) * wide_width
            + tl.cast(piece, tl.int64) * LANES
        )
        offs = row * LANES + lane + tl.where(wraps, pitch_v - all_pieces_v, 0) * VEC
        last = (piece + row == pieces - 1) | (piece + row == 2 * pieces - 1)
        mask = (row < left) & (lane < (LANES // VEC - tl.where(last, short_v, 0)) * VEC)
        size = (left * (LANES // VEC) - tl.where(piece + left >= pieces, short_v, 0)) * VEC
    else:
        start = block * (width_v * VEC)
        base = tl.cast(first, tl.int64) * wide_pitch + start
        offs = row * (pitch_v * VEC) + lane
        mask = (lane < width_v * VEC) & (start + lane < pitch_v * VEC)
        if WHOLE:
            mask = tl.broadcast_to(mask, (ROWS_A_TILE, LANES))
        else:
            mask = mask & (row < left)
        size = left
        if MODE == CYCLES and WHOLE:
            size = left * (pitch_v * VEC)
        elif MODE == CYCLES:  # the last row may be short
            elements = tl.minimum(tl.cast(total_v, tl.int64) * VEC - base, ROWS_A_TILE * wide_pitch).to(
                tl.int32
            )
            mask = mask & (offs < (elements // VEC) * VEC)
            size = elements
    return base, offs, mask, size


@triton.jit
def channels_held(width_v, inner, channels, MODE: tl.constexpr, VEC: tl.constexpr):
    """How many channels a block is answerable for."""
    if MODE == RUNS:
        held = 1
    elif MODE == CYCLES:
        held = channels
    elif MODE == ROWS:
        held = width_v * VEC
    else:
        held = (width_v * VEC) // inner
    return held


@triton.jit
def channels_of_block(block, k, held, channels):
    """The k-th channels of a block: (offs_c, mask_c), as wide as k."""
    offs_c = block * held + k
    return offs_c, (k < held) & (offs_c < channels)


@triton.jit
def values_a_channel(size, inner, channels, MODE: tl.constexpr):
    """What a `size` of tile() means for each channel of the block."""
    if MODE == PLANES:
        count = size * inner
    elif MODE == CYCLES:
        count = size // channels
    else:
        count = size
    return count


@triton.jit
def sum_by_channel(
    values, offs_k, width_v, inner, channels,
    MODE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """[LANES] -> the sums of the block's offs_k-th channels, as wide as offs_k. Lanes that hold nothing are
    left out.
    """
    FOLD: tl.constexpr = offs_k.shape[0]
    if MODE == ROWS:
        sums = values
    elif FOLD == 1 and POSITIONS == LANES:  # the whole block is one channel
        if MODE == PLANES:
            values = tl.where(tl.arange(0, LANES) < width_v * VEC, values, 0.0)
        sums = tl.sum(values[None, :], 1)
    else:
        k, j = offs_k[:, None], tl.arange(0, POSITIONS)[None, :]
        if MODE == PLANES:
            lane = k * inner + j
            mask = (j < inner) & (lane < width_v * VEC)
        else:
            lane = j * channels + k
            mask = (k < channels) & (lane < width_v * VEC)
        gathered = tl.gather(values, tl.reshape(tl.where(mask, lane, 0), (FOLD * POSITIONS,)), 0)
        sums = tl.sum(tl.where(mask, tl.reshape(gathered, (FOLD, POSITIONS)), 0.0), 1)
    return sums
