"""Backward of a normalization whose cell is a row: with xhat = (x - mean) * rstd and g = dy * gamma,

    dx = rstd * (g - mean of g - xhat * mean of g * xhat),    dgamma = sum of dy * xhat,    dbeta = sum of dy

the means over a row, the sums over all rows. A program that holds whole rows reads dy and x once and keeps
the sums of all columns in registers, over the rows it visits (row_gradients_kernel). Rows too wide for that
are read twice: first by programs that own a block of columns each, add up its columns and leave what each row
contributes (column_gradients_kernel), then element by element (wide_gradients_kernel). Parameter gradients
alone are the first of these two.

Every program leaves its sums in partials, [programs, 1 or 2, width]: see column_sums.py."""

import triton
import triton.language as tl

from .moments import product_in_tile
from .row_norm import TABLES, columns, group_of_rows

SIZES = ["rows", "width_v", "groups", "programs", "blocks", "splits"]


@triton.jit
def load_statistics(table_ptr, rows, first, row, inside):
    """(mean, rstd) of a group's rows, shaped as `row`."""
    mean = tl.load(table_ptr + first + row, mask=inside, other=0.0)
    return mean, tl.load(table_ptr + rows + first + row, mask=inside, other=0.0)


@triton.jit
def gamma_of(weight_ptr, column, exists, ACC: tl.constexpr, AGAIN: tl.constexpr):
    """Gamma of columns, or 1 where there is none. AGAIN: it has been loaded before, and shall be again rather
    than stay in registers, of which there are none to spare: a load that differs is not taken for the same.
    """
    if weight_ptr is None:
        gamma = tl.full(column.shape, 1.0, ACC)
    else:
        policy: tl.constexpr = "evict_last" if AGAIN else ""
        gamma = tl.load(weight_ptr + column, mask=exists, other=1.0, eviction_policy=policy)
        if gamma.dtype.primitive_bitwidth == 16:
            gamma = gamma.to(tl.float32)  # see normalizers/common.store_as
        gamma = gamma.to(ACC)
    return gamma


@triton.jit
def over_rows(values, U: tl.constexpr):
    """[U * R, LANES] -> [R, LANES]: rows that lie R apart, which one thread holds, are added up."""
    R: tl.constexpr = values.shape[0] // U
    return tl.sum(tl.reshape(values, (U, R, values.shape[1])), 0)


@triton.jit
def by_vector(values, VEC: tl.constexpr):
    """[R, LANES] -> [R, LANES // VEC]: neighbours, which one thread holds, are added up: fewer registers."""
    return tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // VEC, VEC)), 2)


@triton.jit
def one_row(values):
    """[R, LANES] -> [1, LANES]."""
    if values.shape[0] > 1:
        values = tl.sum(values, 0)[None, :]
    return values


@triton.jit
def store_sums(
    partials_ptr, program, column, exists, width, sum_w, sum_b, WEIGHT: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """sums: [R, LANES], of dy * xhat and of dy. WEIGHT, BIAS: which of them are wanted."""
    mine_ptr = partials_ptr + tl.cast(program, tl.int64) * (width * (WEIGHT + BIAS))
    if WEIGHT:
        tl.store(mine_ptr + column, one_row(sum_w), mask=exists)
    if BIAS:
        tl.store(mine_ptr + WEIGHT * width + column, one_row(sum_b), mask=exists)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def row_gradients_kernel(
    dy_ptr, x_ptr, dx_ptr, table_ptr, weight_ptr, partials_ptr,
    rows, width_v, groups, programs,
    T: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Program p takes the groups p, p + programs ... of unroll * rows rows each."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    VEC: tl.constexpr = T.vec
    U: tl.constexpr = T.unroll
    R: tl.constexpr = T.rows
    LANES: tl.constexpr = T.lanes
    PARTS: tl.constexpr = T.parts
    WHOLE: tl.constexpr = T.whole
    width = width_v * VEC
    count = width.to(ACC)
    sums_w = ()
    sums_b = ()
    for _ in tl.static_range(PARTS if WEIGHT else 0):
        sums_w = sums_w + (tl.zeros((R, LANES), ACC),)
    for _ in tl.static_range(PARTS if BIAS else 0):
        sums_b = sums_b + (tl.zeros((R, LANES), ACC),)
    for group in tl.range(tl.program_id(0), groups, programs):
        first = group * (U * R)
        base, row, lane, inside = group_of_rows(first, rows, width, U * R, LANES)
        held_g = ()
        held_x = ()
        for part in tl.static_range(PARTS):
            column, exists = columns(part, lane, width, WHOLE or part < PARTS - 1)
            offs, mask = row * width + column, inside & exists
            held_g += (tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first"),)
            held_x += (tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first"),)
        mean, rstd = load_statistics(table_ptr, rows, first, row, inside)
        mean_g = tl.zeros((U * R, LANES // VEC), ACC)
        mean_gx = tl.zeros((U * R, LANES // VEC), ACC)
        new_w = ()
        new_b = ()
        for part in tl.static_range(PARTS):
            column, exists = columns(part, lane, width, WHOLE or part < PARTS - 1)
            if R == 1 and part > 0:
                # or the gamma of all parts is loaded in advance, and its registers are then missing elsewhere
                tl.debug_barrier()
            g = held_g[part].to(ACC)
            gx = g * ((held_x[part].to(ACC) - mean) * rstd)  # 0 in lanes that are not there: g is
            if WEIGHT:
                new_w += (sums_w[part] + over_rows(gx, U),)
            if BIAS:
                new_b += (sums_b[part] + over_rows(g, U),)
            gamma = gamma_of(weight_ptr, tl.broadcast_to(column, (U * R, LANES)), exists, ACC, False)
            mean_g += by_vector(product_in_tile(g, gamma, VEC), VEC)
            mean_gx += by_vector(product_in_tile(gx, gamma, VEC), VEC)
        sums_w = new_w
        sums_b = new_b
        mean_g = (tl.sum(mean_g, 1) / count)[:, None]
        mean_gx = (tl.sum(mean_gx, 1) / count)[:, None]
        for part in tl.static_range(PARTS):
            column, exists = columns(part, lane, width, WHOLE or part < PARTS - 1)
            gamma = gamma_of(weight_ptr, tl.broadcast_to(column, (U * R, LANES)), exists, ACC, True)
            xhat = (held_x[part].to(ACC) - mean) * rstd
            dx = rstd * (held_g[part].to(ACC) * gamma - mean_g - xhat * mean_gx)
            tl.store(
                dx_ptr + base + (row * width + column), dx.to(dx_ptr.dtype.element_ty), mask=inside & exists,
                eviction_policy="evict_first",
            )  # fmt: skip
    lanes = tl.arange(0, LANES)[None, :]
    for part in tl.static_range(PARTS if WEIGHT or BIAS else 0):
        column, exists = columns(part, lanes, width, WHOLE or part < PARTS - 1)
        store_sums(
            partials_ptr, tl.program_id(0), column, exists, width,
            sums_w[part] if WEIGHT else None, sums_b[part] if BIAS else None, WEIGHT, BIAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def column_gradients_kernel(
    dy_ptr, x_ptr, table_ptr, weight_ptr, shares_ptr, partials_ptr,
    rows, width_v, groups, programs, blocks,
    T: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Program (block, p) takes the groups p, p + programs ... of unroll * rows rows, and of them a block of
    columns. shares, where given: [blocks, 2, rows], each block's part of a row's sums of g and g * xhat."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    U: tl.constexpr = T.unroll
    R: tl.constexpr = T.rows
    LANES: tl.constexpr = T.lanes
    width = width_v * T.vec
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    column = block * LANES + tl.arange(0, LANES)[None, :]
    exists = column < width
    sum_w = tl.zeros((R, LANES), ACC)
    sum_b = tl.zeros((R, LANES), ACC)
    for group in tl.range(program, groups, programs):
        first = group * (U * R)
        base, row, _, inside = group_of_rows(first, rows, width, U * R, LANES)
        offs, mask = row * width + column, inside & exists
        g = tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        if BIAS:
            sum_b += over_rows(g, U)
        if WEIGHT or shares_ptr is not None:
            x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
            mean, rstd = load_statistics(table_ptr, rows, first, row, inside)
            gx = g * ((x - mean) * rstd)
            if WEIGHT:
                sum_w += over_rows(gx, U)
            if shares_ptr is not None:
                gamma = gamma_of(weight_ptr, tl.broadcast_to(column, (U * R, LANES)), exists, ACC, False)
                mine_ptr = shares_ptr + tl.cast(block, tl.int64) * 2 * rows + first + row
                tl.store(mine_ptr, tl.sum(g * gamma, 1)[:, None], mask=inside)
                tl.store(mine_ptr + rows, tl.sum(gx * gamma, 1)[:, None], mask=inside)
    if WEIGHT or BIAS:
        store_sums(partials_ptr, program, column, exists, width, sum_w, sum_b, WEIGHT, BIAS)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def wide_gradients_kernel(
    dy_ptr, x_ptr, dx_ptr, table_ptr, weight_ptr, shares_ptr,
    rows, width_v, blocks, splits,
    T: tl.constexpr,
):  # fmt: skip
    """dx of row r by programs (r, split), each of which takes the pieces split, split + splits ... of
    unroll * lanes elements, from the row's end: that is what the sweep before left in L2."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    U: tl.constexpr = T.unroll
    LANES: tl.constexpr = T.lanes
    MERGE: tl.constexpr = T.merge
    width = width_v * T.vec
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    base = tl.cast(row, tl.int64) * width
    mean = tl.load(table_ptr + row)
    rstd = tl.load(table_ptr + rows + row)
    sum_g = tl.zeros((MERGE,), ACC)
    sum_gx = tl.zeros((MERGE,), ACC)
    for start in tl.range(0, blocks, MERGE):
        block = start + tl.arange(0, MERGE)
        theirs_ptr = shares_ptr + tl.cast(block, tl.int64) * 2 * rows + row
        sum_g += tl.load(theirs_ptr, mask=block < blocks, other=0.0)
        sum_gx += tl.load(theirs_ptr + rows, mask=block < blocks, other=0.0)
    mean_g = tl.sum(sum_g, 0) / width.to(ACC)
    mean_gx = tl.sum(sum_gx, 0) / width.to(ACC)
    offs = tl.arange(0, U)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    pieces = tl.cdiv(width, U * LANES)
    for step in tl.range(split, pieces, splits):
        column = (pieces - 1 - step) * (U * LANES) + offs
        exists = column < width
        g = tl.load(dy_ptr + base + column, mask=exists, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(x_ptr + base + column, mask=exists, other=0.0, eviction_policy="evict_first").to(ACC)
        gamma = gamma_of(weight_ptr, column, exists, ACC, False)
        dx = rstd * (g * gamma - mean_g - ((x - mean) * rstd) * mean_gx)
        tl.store(
            dx_ptr + base + column, dx.to(dx_ptr.dtype.element_ty), mask=exists, eviction_policy="evict_first"
        )
