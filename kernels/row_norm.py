"""Forward of a normalization whose cell is a row: x is [rows, width], statistics are of each row, weight and
bias of each column. One launch. A row that fits in registers is read once, a longer one twice.

A program holds a group of rows in `parts` tiles of [rows, lanes] (see RowTile). They stay what was loaded, so
that 16-bit data takes 16 bits a value, and are widened where they are used."""

import triton
import triton.language as tl

from .activations import activate
from .geometry import as_scalar
from .moments import Moments, finite_or_zero, merge_along, not_negative, product_in_tile
from .normalizers.common import load_or, reciprocal_std

SIZES = ["rows", "width_v"]
TABLES = ["table_ptr"]  # of two numbers a row: loaded and stored as well without alignment


@triton.jit
def group_of_rows(first, rows, width, R: tl.constexpr, LANES: tl.constexpr):
    """(base, row, lane, inside) of the R rows from `first` on. The element in row r and column c of the group
    is base + row * width + c; inside: which of the rows exist, [R, 1]."""
    row = tl.arange(0, R)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    if R == 1:  # there are no groups without a row
        inside = tl.full((1, 1), 1, tl.int1)
    else:
        inside = first + row < rows
    return tl.cast(first, tl.int64) * width, row, lane, inside


@triton.jit
def columns(part: tl.constexpr, lane, width, WHOLE: tl.constexpr):
    """(column, exists) of the lanes of a part. WHOLE: all of them do, as in any part but the last."""
    column = part * lane.shape[1] + lane
    if WHOLE:
        exists = tl.full(lane.shape, 1, tl.int1)
    else:
        exists = column < width
    return column, exists


@triton.jit
def normalized(distance, rstd, column, exists, weight_ptr, bias_ptr, ACC: tl.constexpr):
    """rstd * distance * gamma + beta, with the gamma and beta of the columns."""
    y = distance * rstd
    if weight_ptr is not None:
        y = y * load_or(weight_ptr, column, exists, 1.0, ACC)
    if bias_ptr is not None:
        y = y + load_or(bias_ptr, column, exists, 0.0, ACC)
    return y


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def row_norm_kernel(
    x_ptr, y_ptr, table_ptr, weight_ptr, bias_ptr, z_ptr,
    eps: tl.float64,
    rows, width_v,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """One group a program. table: [2, rows], mean and rstd. z, ACT: as in transform.py."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    R: tl.constexpr = T.rows
    LANES: tl.constexpr = T.lanes
    PARTS: tl.constexpr = T.parts
    WHOLE: tl.constexpr = T.whole
    width = width_v * T.vec
    count = width.to(ACC)
    first = tl.program_id(0) * R
    base, row, lane, inside = group_of_rows(first, rows, width, R, LANES)
    held = ()
    for part in tl.static_range(PARTS):
        column, exists = columns(part, lane, width, WHOLE or part < PARTS - 1)
        # evict_first: nobody reads x again soon, and gamma and beta are better kept in L1
        held = held + (
            tl.load(
                x_ptr + base + (row * width + column), mask=inside & exists, other=0.0,
                eviction_policy="evict_first",
            ),
        )  # fmt: skip
    total = tl.zeros((R, LANES), ACC)
    for part in tl.static_range(PARTS):
        total += held[part].to(ACC)
    # The rounding of this mean matters at mean 1e4 and std 1: the mean distance from it puts it right.
    pivot = (tl.sum(total, 1) / count)[:, None]
    off = tl.zeros((R, LANES), ACC)
    squares = tl.zeros((R, LANES), ACC)
    for part in tl.static_range(PARTS):
        column, exists = columns(part, lane, width, WHOLE or part < PARTS - 1)
        distance = held[part].to(ACC) - pivot
        if not (WHOLE or part < PARTS - 1):
            distance = tl.where(exists, distance, 0.0)
        off += distance
        squares += product_in_tile(distance, distance, T.vec)
    sum_off = tl.sum(off, 1)[:, None]
    shift = sum_off / count
    variance = not_negative(tl.sum(squares, 1)[:, None] - shift * sum_off) / count
    rstd = reciprocal_std(variance, as_scalar(eps, ACC), ACC)
    if table_ptr is not None:
        tl.store(table_ptr + first + row, pivot + shift, mask=inside)
        tl.store(table_ptr + rows + first + row, rstd, mask=inside)
    for part in tl.static_range(PARTS):
        column, exists = columns(part, lane, width, WHOLE or part < PARTS - 1)
        if R == 1 and part > 0:
            # or gamma and beta of all parts are loaded in advance, into registers that are missing elsewhere
            tl.debug_barrier()
        distance = (held[part].to(ACC) - pivot) - shift
        # [R, LANES], each warp its own: fewer would come by way of shared memory, and three barriers a load
        wide = tl.broadcast_to(column, (R, LANES))
        y = normalized(distance, rstd, wide, exists, weight_ptr, bias_ptr, ACC)
        if z_ptr is not None:
            y += tl.load(
                z_ptr + base + (row * width + column), mask=inside & exists, other=0.0,
                eviction_policy="evict_first",
            ).to(ACC)  # fmt: skip
        y = activate(y, ACT)
        tl.store(
            y_ptr + base + (row * width + column), y.to(y_ptr.dtype.element_ty), mask=inside & exists,
            eviction_policy="evict_first",
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def long_row_norm_kernel(
    x_ptr, y_ptr, table_ptr, weight_ptr, bias_ptr, z_ptr,
    eps: tl.float64,
    rows, width_v,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """One row a program, read twice, unroll * lanes values a step. table: [2, rows], mean and rstd.

    Each lane has moments of its own, updated step by step (Youngs and Cramer 1971) about its own mean so far:
    a row may begin far from where it goes on, and one pivot for all of it would cost its digits."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    U: tl.constexpr = T.unroll
    LANES: tl.constexpr = T.lanes
    STEP: tl.constexpr = U * LANES
    width = width_v * T.vec
    row = tl.program_id(0)
    base = tl.cast(row, tl.int64) * width
    offs = tl.arange(0, U)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = width // STEP  # at least 1: shorter rows have the other kernel
    # evict_last: read again below, from its end, which is then still in L2
    x = tl.load(x_ptr + base + offs, eviction_policy="evict_last").to(ACC)
    pivot = finite_or_zero(tl.sum(x, 0) * (1.0 / U))[None, :]
    distance = x - pivot
    total = tl.sum(distance, 0)
    shift = total * (1.0 / U)
    squares = tl.sum(distance * distance, 0) - shift * total
    for step in tl.range(1, whole):
        x = tl.load(x_ptr + base + (step * STEP + offs), eviction_policy="evict_last").to(ACC)
        distance = (x - pivot) - shift[None, :]
        total = tl.sum(distance, 0)
        moved = total * (1.0 / tl.cast((step + 1) * U, ACC))
        squares += tl.sum(distance * distance, 0) - moved * total
        shift += moved
    # what is left is a step of its own, in which lanes have some values or none
    left = offs < width - whole * STEP
    x = tl.load(x_ptr + base + (whole * STEP + offs), mask=left, other=0.0, eviction_policy="evict_last").to(
        ACC
    )
    distance = tl.where(left, (x - pivot) - shift[None, :], 0.0)
    total = tl.sum(distance, 0)
    count = (whole * U + tl.sum(left.to(tl.int32), 0)).to(ACC)
    moved = total / count
    squares = not_negative(squares + (tl.sum(distance * distance, 0) - moved * total))
    m = merge_along(Moments(count, tl.reshape(pivot, (LANES,)), shift + moved, squares), 0)
    rstd = reciprocal_std(m.m2 / m.count, as_scalar(eps, ACC), ACC)
    if table_ptr is not None:
        one = tl.arange(0, 1)
        tl.store(table_ptr + row + one, tl.full((1,), m.pivot + m.shift, ACC))
        tl.store(table_ptr + rows + row + one, rstd)
    # half a step at a time: beside x there are gamma and beta now
    HALF: tl.constexpr = U // 2
    offs = tl.arange(0, HALF)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    steps = tl.cdiv(width, HALF * LANES)
    for step in tl.range(0, steps):
        column = (steps - 1 - step) * (HALF * LANES) + offs
        exists = column < width
        again = tl.load(x_ptr + base + column, mask=exists, other=0.0, eviction_policy="evict_first").to(ACC)
        y = normalized((again - m.pivot) - m.shift, rstd[None, :], column, exists, weight_ptr, bias_ptr, ACC)
        if z_ptr is not None:
            y += tl.load(z_ptr + base + column, mask=exists, other=0.0, eviction_policy="evict_first").to(ACC)
        y = activate(y, ACT)
        tl.store(
            y_ptr + base + column, y.to(y_ptr.dtype.element_ty), mask=exists, eviction_policy="evict_first"
        )
