"""Backward of LayerNorm. With xhat = (x - mean) * rstd and wdy = dy * gamma,

    dx = rstd * (wdy - mean of wdy - xhat * mean of wdy * xhat)
    dgamma = sum of dy * xhat,    dbeta = sum of dy

where means are over a row and sums over all rows. A program that can hold whole rows reads dy and x once
and keeps the sums of all columns in registers, over the rows it visits (row_gradients_kernel). Rows too
wide for that are read twice: first by programs that each take a block of columns, sum it and store what
each row contributes (column_gradients_kernel), then element by element (wide_gradients_kernel). If only
parameters need gradients, the first of these two is all.

Every program stores its sums in partials, [programs * partial_rows, 1 or 2, width]: those of each warp, or of
each set of warps that share a row, in a row of their own. column_sums.py adds them up.

With an activation, row_activation_kernel comes first: dresidual = dy * act'(v), where v = xhat * gamma +
beta + residual. The others read dresidual in place of dy, because their registers are full (see
row_plan.py)."""

import triton
import triton.language as tl

from .activations import times_slope
from .memory import await_launch_before, let_next_launch_start, load_or, read, write
from .moments import product_in_tile
from .row_norm import STATS, by_vector, columns, group_of_rows, normalized, sums_of_rows

SIZES = ["rows", "width_v", "groups", "programs", "blocks", "splits"]


@triton.jit
def load_statistics(stats_ptr, rows, first, row, inside):
    """(mean, rstd) of a group's rows, of row's shape."""
    mean = tl.load(stats_ptr + first + row, mask=inside, other=0.0)
    return mean, tl.load(stats_ptr + rows + first + row, mask=inside, other=0.0)


@triton.jit
def over_rows(values, T: tl.constexpr):
    """[unroll * rows, lanes] -> [rows, lanes]: sums rows that lie `rows` apart, which one thread holds."""
    return tl.sum(tl.reshape(values, (T.unroll, T.rows, T.lanes)), 0)


@triton.jit
def by_share(values, T: tl.constexpr):
    """[R, LANES] -> [R, shares]: sums of equal parts of each row, those that one warp holds."""
    return tl.sum(tl.reshape(values, (values.shape[0], T.shares, values.shape[1] // T.shares)), 2)


@triton.jit
def store_partial_rows(partials_ptr, program, pitch, column, exists, sums, T: tl.constexpr):
    """Stores one program's sums, [rows, lanes], in `partial_rows` rows of partials, `pitch` elements apart.

    What one warp holds is added up: neighbouring rows, and rows that the program's warps together lie apart.
    Sums of several warps are not: that takes shared memory, in which up to 32 lanes of a warp would want the
    same bank, while nothing is loaded [sass]."""
    R: tl.constexpr = T.partial_rows
    NEIGHBOURS: tl.constexpr = min(T.rows // R, max(1, 32 * T.vec // T.lanes))
    if R < T.rows:
        apart = tl.reshape(sums, (T.rows // (R * NEIGHBOURS), R, NEIGHBOURS, T.lanes))
        sums = tl.sum(tl.sum(apart, 0), 1)
    row = tl.cast(program, tl.int64) * R + tl.arange(0, R)[:, None]
    tl.store(partials_ptr + row * pitch + column, sums, mask=exists)


@triton.jit
def store_sums(
    partials_ptr, program, column, exists, width, sum_w, sum_b,
    T: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Stores one program's sums of dy * xhat and of dy. WEIGHT, BIAS: which are wanted."""
    pitch = width * (WEIGHT + BIAS)
    if WEIGHT:
        store_partial_rows(partials_ptr, program, pitch, column, exists, sum_w, T)
    if BIAS:
        store_partial_rows(partials_ptr + WEIGHT * width, program, pitch, column, exists, sum_b, T)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STATS)
def row_gradients_kernel(
    dy_ptr, x_ptr, dx_ptr, stats_ptr, weight_ptr, partials_ptr,
    rows, width_v, groups, programs,
    T: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program p takes the groups p, p + programs ... of unroll * rows rows each."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PARTS: tl.constexpr = T.parts
    ROWS: tl.constexpr = T.unroll * T.rows
    width = width_v * T.vec
    count = width.to(ACC)
    sums_w = ()
    sums_b = ()
    for _ in tl.static_range(PARTS if WEIGHT else 0):
        sums_w = sums_w + (tl.full((T.rows, T.lanes), 0.0, ACC),)
    for _ in tl.static_range(PARTS if BIAS else 0):
        sums_b = sums_b + (tl.full((T.rows, T.lanes), 0.0, ACC),)
    await_launch_before(PDL)
    for group in tl.range(tl.program_id(0), groups, programs):
        first = group * ROWS
        base, row, lane, inside = group_of_rows(first, rows, width, ROWS, T.lanes)
        dys = ()
        xs = ()
        for part in tl.static_range(PARTS):
            column, exists = columns(part, lane, width, T)
            offs, mask = row * width + column, inside & exists
            dys += (read(dy_ptr + base + offs, mask),)
            xs += (read(x_ptr + base + offs, mask),)
        mean, rstd = load_statistics(stats_ptr, rows, first, row, inside)
        wdy = tl.full((ROWS, T.lanes // T.vec), 0.0, ACC)
        wdy_xhat = tl.full((ROWS, T.lanes // T.vec), 0.0, ACC)
        new_w = ()
        new_b = ()
        for part in tl.static_range(PARTS):
            column, exists = columns(part, lane, width, T)
            if T.rows == 1 and part > 0:
                # without it, the gamma of all parts is loaded in advance, into registers needed elsewhere
                tl.debug_barrier()
            dy = dys[part].to(ACC)
            dy_xhat = dy * ((xs[part].to(ACC) - mean) * rstd)  # 0 in lanes out of bounds, where dy is 0
            if WEIGHT:
                new_w += (sums_w[part] + over_rows(dy_xhat, T),)
            if BIAS:
                new_b += (sums_b[part] + over_rows(dy, T),)
            wide = tl.broadcast_to(column, (ROWS, T.lanes))
            gamma = load_or(weight_ptr, wide, exists, 1.0, ACC)
            wdy += by_vector(product_in_tile(dy, gamma, T.vec), T.vec)
            wdy_xhat += by_vector(product_in_tile(dy_xhat, gamma, T.vec), T.vec)
        sums_w = new_w
        sums_b = new_b
        sum_wdy, sum_wdy_xhat = sums_of_rows(wdy, wdy_xhat)
        mean_wdy, mean_wdy_xhat = sum_wdy / count, sum_wdy_xhat / count
        for part in tl.static_range(PARTS):
            column, exists = columns(part, lane, width, T)
            # It is loaded again, not kept in registers: the other eviction policy stops the compiler from
            # merging the two loads.
            wide = tl.broadcast_to(column, (ROWS, T.lanes))
            gamma = load_or(weight_ptr, wide, exists, 1.0, ACC, "evict_last")
            xhat = (xs[part].to(ACC) - mean) * rstd
            dx = rstd * (dys[part].to(ACC) * gamma - mean_wdy - xhat * mean_wdy_xhat)
            write(dx_ptr + base + (row * width + column), dx, inside & exists)
    let_next_launch_start(PDL)
    lanes = tl.arange(0, T.lanes)[None, :]
    for part in tl.static_range(PARTS if WEIGHT or BIAS else 0):
        column, exists = columns(part, lanes, width, T)
        store_sums(
            partials_ptr, tl.program_id(0), column, exists, width,
            sums_w[part] if WEIGHT else None, sums_b[part] if BIAS else None, T, WEIGHT, BIAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STATS)
def column_gradients_kernel(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, shares_ptr, partials_ptr,
    rows, width_v, groups, programs, blocks,
    T: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block, p) takes a block of columns of the groups p, p + programs ... of unroll * rows rows.
    shares, [blocks * T.shares, 2, rows], if given, receives the sums of wdy and wdy * xhat over each warp's
    part of a row, so that warps need not wait for each other."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = T.unroll * T.rows
    width = width_v * T.vec
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    column = block * T.lanes + tl.arange(0, T.lanes)[None, :]
    exists = column < width
    sum_w = tl.full((T.rows, T.lanes), 0.0, ACC)
    sum_b = tl.full((T.rows, T.lanes), 0.0, ACC)
    await_launch_before(PDL)
    for group in tl.range(program, groups, programs):
        first = group * ROWS
        base, row, _, inside = group_of_rows(first, rows, width, ROWS, T.lanes)
        offs, mask = row * width + column, inside & exists
        dy = read(dy_ptr + base + offs, mask, "evict_last").to(ACC)
        if BIAS:
            sum_b += over_rows(dy, T)
        if WEIGHT or shares_ptr is not None:
            x = read(x_ptr + base + offs, mask, "evict_last").to(ACC)
            mean, rstd = load_statistics(stats_ptr, rows, first, row, inside)
            dy_xhat = dy * ((x - mean) * rstd)
            if WEIGHT:
                sum_w += over_rows(dy_xhat, T)
            if shares_ptr is not None:
                gamma = load_or(weight_ptr, tl.broadcast_to(column, (ROWS, T.lanes)), exists, 1.0, ACC)
                wdy = by_share(by_vector(product_in_tile(dy, gamma, T.vec), T.vec), T)
                wdy_xhat = by_share(by_vector(product_in_tile(dy_xhat, gamma, T.vec), T.vec), T)
                share = block * T.shares + tl.arange(0, T.shares)[None, :]
                mine_ptr = shares_ptr + tl.cast(share, tl.int64) * 2 * rows + first + row
                tl.store(mine_ptr, wdy, mask=inside)
                tl.store(mine_ptr + rows, wdy_xhat, mask=inside)
    let_next_launch_start(PDL)
    if WEIGHT or BIAS:
        store_sums(partials_ptr, program, column, exists, width, sum_w, sum_b, T, WEIGHT, BIAS)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STATS)
def wide_gradients_kernel(
    dy_ptr, x_ptr, dx_ptr, stats_ptr, weight_ptr, shares_ptr,
    rows, width_v, blocks, splits,
    T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dx of row r, by programs (r, split), each of which takes the pieces split, split + splits ... of
    unroll * lanes elements, from the row's end, which the launch before has left in L2."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    STEP: tl.constexpr = T.unroll * T.lanes
    MERGE: tl.constexpr = T.partials_per_iter
    width = width_v * T.vec
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    base = tl.cast(row, tl.int64) * width
    mean = tl.load(stats_ptr + row)
    rstd = tl.load(stats_ptr + rows + row)
    await_launch_before(PDL)  # what is loaded above is the forward's
    sum_wdy = tl.zeros((MERGE,), ACC)
    sum_wdy_xhat = tl.zeros((MERGE,), ACC)
    for start in tl.range(0, blocks, MERGE):
        block = start + tl.arange(0, MERGE)
        theirs_ptr = shares_ptr + tl.cast(block, tl.int64) * 2 * rows + row
        sum_wdy += tl.load(theirs_ptr, mask=block < blocks, other=0.0)
        sum_wdy_xhat += tl.load(theirs_ptr + rows, mask=block < blocks, other=0.0)
    mean_wdy = tl.sum(sum_wdy, 0) / width.to(ACC)
    mean_wdy_xhat = tl.sum(sum_wdy_xhat, 0) / width.to(ACC)
    offs = tl.arange(0, T.unroll)[:, None] * T.lanes + tl.arange(0, T.lanes)[None, :]
    pieces = tl.cdiv(width, STEP)
    for step in tl.range(split, pieces, splits):
        column = (pieces - 1 - step) * STEP + offs
        exists = column < width
        dy = read(dy_ptr + base + column, exists).to(ACC)
        x = read(x_ptr + base + column, exists).to(ACC)
        gamma = load_or(weight_ptr, column, exists, 1.0, ACC)
        dx = rstd * (dy * gamma - mean_wdy - ((x - mean) * rstd) * mean_wdy_xhat)
        write(dx_ptr + base + column, dx, exists)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STATS)
def row_activation_kernel(
    dy_ptr, x_ptr, residual_ptr, dresidual_ptr, stats_ptr, weight_ptr, bias_ptr,
    rows, width_v, splits,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Program (group, split) takes every splits-th tile of a group of rows."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    width = width_v * T.vec
    first = tl.program_id(0) // splits * T.rows
    base, row, lane, inside = group_of_rows(first, rows, width, T.rows, T.lanes)
    mean, rstd = load_statistics(stats_ptr, rows, first, row, inside)
    for piece in tl.range(tl.program_id(0) % splits, tl.cdiv(width, T.lanes), splits):
        column = piece * T.lanes + lane
        exists = column < width
        offs, mask = base + (row * width + column), inside & exists
        dy = read(dy_ptr + offs, mask).to(ACC)
        x = read(x_ptr + offs, mask, "evict_last").to(ACC)
        wide = tl.broadcast_to(column, (T.rows, T.lanes))
        v = normalized(x - mean, rstd, wide, exists, weight_ptr, bias_ptr, ACC)
        if residual_ptr is not None:
            v += read(residual_ptr + offs, mask).to(ACC)
        dy = times_slope(dy, v, ACT)
        write(dresidual_ptr + offs, dy, mask, "")
