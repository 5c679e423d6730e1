"""Forward of LayerNorm: x is [rows, width], statistics are of each row, weight and bias of each column. One
launch. A row that fits in registers is read once, a longer one twice.

A program holds a group of rows in `parts` tiles of [rows, lanes] (see RowTile). They stay as they were
loaded, so that 16-bit data takes 16 bits a value, and are widened where they are used."""

import triton
import triton.language as tl

from .activations import activate
from .memory import as_scalar, load_or, read, write
from .moments import Moments, finite_or_zero, merge_along, not_negative, product_in_tile
from .normalizers.common import reciprocal_std

SIZES = ["rows", "width_v"]
STATS = ["stats_ptr"]  # two numbers a row, which need no alignment


@triton.jit
def group_of_rows(first, rows, width, R: tl.constexpr, LANES: tl.constexpr):
    """(base, row, lane, inside) of the R rows from `first` on. The element in row r and column c of these is
    base + r * width + c. inside: which of the rows exist, [R, 1]."""
    row = tl.arange(0, R)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    if R == 1:  # every group has a row
        inside = tl.full((1, 1), 1, tl.int1)
    else:
        inside = first + row < rows
    return tl.cast(first, tl.int64) * width, row, lane, inside


@triton.jit
def columns(part: tl.constexpr, lane, width, T: tl.constexpr):
    """(column, exists) of the lanes of a part. All of them exist in any part but the last."""
    column = part * T.lanes + lane
    if T.even or part < T.parts - 1:
        exists = tl.full(lane.shape, 1, tl.int1)
    else:
        exists = column < width
    return column, exists


@triton.jit
def by_vector(values, VEC: tl.constexpr):
    """[R, LANES] -> [R, LANES // VEC]: sums neighbours, which one thread holds, to save registers."""
    return tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // VEC, VEC)), 2)


@triton.jit
def sums_of_rows(a, b):
    """[R, LANES] each -> the sums of both over rows, [R, 1] each. Warps that share a row exchange their sums
    through shared memory; those of a and b together, so that they wait for each other half as often, but in
    programs of 16 warps, where that would take a register too many [sass]."""
    if a.shape[1] < 16 * 32:
        sum_a, sum_b = tl.split(tl.sum(tl.join(a, b), 1))
    else:
        sum_a = tl.sum(a, 1)
        sum_b = tl.sum(b, 1)
    return sum_a[:, None], sum_b[:, None]


@triton.jit
def parameters(part: tl.constexpr, lane, width, weight_ptr, bias_ptr, T: tl.constexpr):
    """(gamma, beta) in a part's lanes, as they are stored; 1 and 0 for what there is not. They are [rows,
    lanes], so that each warp loads its own: fewer would go through shared memory, with three barriers."""
    column, exists = columns(part, lane, width, T)
    column = tl.broadcast_to(column, (T.rows, T.lanes))
    if weight_ptr is None:
        gamma = 1.0
    else:
        gamma = tl.load(weight_ptr + column, mask=exists, other=1.0)
    if bias_ptr is None:
        beta = 0.0
    else:
        beta = tl.load(bias_ptr + column, mask=exists, other=0.0)
    return gamma, beta


@triton.jit
def widened(value, ACC: tl.constexpr):
    """A parameter in the type ACC."""
    if value.dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)  # see memory.store_as
    return value.to(ACC)


@triton.jit
def normalized(distance, rstd, column, exists, weight_ptr, bias_ptr, ACC: tl.constexpr):
    """rstd * distance * gamma + beta."""
    y = distance * rstd
    if weight_ptr is not None:
        y = y * load_or(weight_ptr, column, exists, 1.0, ACC)
    if bias_ptr is not None:
        y = y + load_or(bias_ptr, column, exists, 0.0, ACC)
    return y


@triton.jit
def store_from_warps(stats_ptr, rows, row, inside, mean, rstd, T: tl.constexpr):
    """Stores two values a row, [R, 1] each, by the first of the lanes that hold the row. As [R, 1] they would
    first go through shared memory, to neighbouring threads. The minimum hides that they are neighbours."""
    vector = tl.arange(0, T.lanes // T.vec)[None, :]
    offs = tl.minimum(row, rows) + vector * 0
    alone = inside & (vector == 0)
    tl.store(stats_ptr + offs, tl.broadcast_to(mean, offs.shape), mask=alone)
    tl.store(stats_ptr + rows + offs, tl.broadcast_to(rstd, offs.shape), mask=alone)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STATS)
def row_norm_kernel(
    x_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, residual_ptr,
    eps: tl.float64,
    rows, width_v,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """One group of rows a program. stats: [2, rows], mean and rstd. residual and ACT: as in
    elementwise.py."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PARTS: tl.constexpr = T.parts
    width = width_v * T.vec
    count = width.to(ACC)
    first = tl.program_id(0) * T.rows
    base, row, lane, inside = group_of_rows(first, rows, width, T.rows, T.lanes)
    tiles = ()
    for part in tl.static_range(PARTS):
        column, exists = columns(part, lane, width, T)
        # evict_first: x is not read again soon, and L1 is better used for gamma and beta
        tiles = tiles + (read(x_ptr + base + (row * width + column), inside & exists),)
    if T.early:
        gamma, beta = parameters(0, lane, width, weight_ptr, bias_ptr, T)
    total = tl.full((T.rows, T.lanes), 0.0, ACC)
    for part in tl.static_range(PARTS):
        total += tiles[part].to(ACC)
    # At mean 1e4 and std 1 the rounding of this mean matters: the mean distance from it corrects it.
    pivot = (tl.sum(total, 1) / count)[:, None]
    distances = tl.full((T.rows, T.lanes), 0.0, ACC)
    squares = tl.full((T.rows, T.lanes), 0.0, ACC)
    for part in tl.static_range(PARTS):
        column, exists = columns(part, lane, width, T)
        distance = tiles[part].to(ACC) - pivot
        if not (T.even or part < T.parts - 1):
            distance = tl.where(exists, distance, 0.0)
        distances += distance
        squares += product_in_tile(distance, distance, T.vec)
    sum_distances, sum_squares = sums_of_rows(by_vector(distances, T.vec), by_vector(squares, T.vec))
    shift = sum_distances / count
    variance = not_negative(sum_squares - shift * sum_distances) / count
    rstd = reciprocal_std(variance, as_scalar(eps, ACC), ACC)
    for part in tl.static_range(PARTS):
        if T.early:  # the next part's, before this one is stored: the compiler moves no load past a store
            later = parameters(min(part + 1, PARTS - 1), lane, width, weight_ptr, bias_ptr, T)
        else:
            gamma, beta = parameters(part, lane, width, weight_ptr, bias_ptr, T)
        column, exists = columns(part, lane, width, T)
        y = ((tiles[part].to(ACC) - pivot) - shift) * rstd
        if weight_ptr is not None:
            y = y * widened(gamma, ACC)
        if bias_ptr is not None:
            y = y + widened(beta, ACC)
        if residual_ptr is not None:
            y += read(residual_ptr + base + (row * width + column), inside & exists).to(ACC)
        y = activate(y, ACT)
        write(y_ptr + base + (row * width + column), y, inside & exists)
        if T.early:
            gamma, beta = later
    if stats_ptr is not None:
        store_from_warps(stats_ptr + first, rows, row, inside, pivot + shift, rstd, T)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STATS)
def long_row_norm_kernel(
    x_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, residual_ptr,
    eps: tl.float64,
    rows, width_v,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """One row a program, read twice, unroll * lanes values a step. stats: [2, rows], mean and rstd.

    Each lane has moments of its own, updated step by step about its own mean so far (Youngs and Cramer 1971):
    a row's first values may be far from the others, and a single pivot would lose digits."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    U: tl.constexpr = T.unroll
    STEP: tl.constexpr = U * T.lanes
    width = width_v * T.vec
    row = tl.program_id(0)
    base = tl.cast(row, tl.int64) * width
    offs = tl.arange(0, U)[:, None] * T.lanes + tl.arange(0, T.lanes)[None, :]
    steps = width // STEP  # at least 1: shorter rows go to the other kernel
    # evict_last: the row is read again below, from its end, which is still in L2 then
    x = tl.load(x_ptr + base + offs, eviction_policy="evict_last").to(ACC)
    pivot = finite_or_zero(tl.sum(x, 0) * (1.0 / U))[None, :]
    distance = x - pivot
    total = tl.sum(distance, 0)
    shift = total * (1.0 / U)
    squares = tl.sum(distance * distance, 0) - shift * total
    for step in tl.range(1, steps):
        x = tl.load(x_ptr + base + (step * STEP + offs), eviction_policy="evict_last").to(ACC)
        distance = (x - pivot) - shift[None, :]
        total = tl.sum(distance, 0)
        moved = total * (1.0 / tl.cast((step + 1) * U, ACC))
        squares += tl.sum(distance * distance, 0) - moved * total
        shift += moved
    # the rest of the row, of which a lane has some values or none
    mask = offs < width - steps * STEP
    x_ptrs = x_ptr + base + (steps * STEP + offs)
    x = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
    distance = tl.where(mask, (x - pivot) - shift[None, :], 0.0)
    total = tl.sum(distance, 0)
    count = (steps * U + tl.sum(mask.to(tl.int32), 0)).to(ACC)
    moved = total / count
    squares = not_negative(squares + (tl.sum(distance * distance, 0) - moved * total))
    m = merge_along(Moments(count, tl.reshape(pivot, (T.lanes,)), shift + moved, squares), 0)
    rstd = reciprocal_std(m.m2 / m.count, as_scalar(eps, ACC), ACC)
    if stats_ptr is not None:
        one = tl.arange(0, 1)
        tl.store(stats_ptr + row + one, tl.full((1,), m.pivot + m.shift, ACC))
        tl.store(stats_ptr + rows + row + one, rstd)
    # half as much at a time: gamma and beta take registers too
    HALF: tl.constexpr = U // 2
    offs = tl.arange(0, HALF)[:, None] * T.lanes + tl.arange(0, T.lanes)[None, :]
    halves = tl.cdiv(width, HALF * T.lanes)
    for step in tl.range(0, halves):
        column = (halves - 1 - step) * (HALF * T.lanes) + offs
        exists = column < width
        x_again = read(x_ptr + base + column, exists).to(ACC)
        y = normalized(
            (x_again - m.pivot) - m.shift, rstd[None, :], column, exists, weight_ptr, bias_ptr, ACC
        )
        if residual_ptr is not None:
            y += read(residual_ptr + base + column, exists).to(ACC)
        y = activate(y, ACT)
        write(y_ptr + base + column, y, exists)
