"""Sums the partial results of programs, or of samples, over rows: [rows, columns] -> [columns]. The order is
fixed, so that the same input gives the same bits."""

import triton
import triton.language as tl

from .memory import await_launch_before, store_as

SIZES = ["rows", "columns", "blocks"]
# the caller's tensors, which need no alignment
RESULTS = ["first_ptr", "second_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=RESULTS)
def column_sums_kernel(
    partials_ptr, first_ptr, second_ptr,
    rows, columns, blocks,
    T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partials: [rows, 2, columns], whose halves are summed to first and second, [columns] each; [rows, 1,
    columns] if only one of these is given. A program sums `lanes` columns of one half, `rows` rows a step."""
    HALVES: tl.constexpr = (first_ptr is not None) + (second_ptr is not None)
    block = tl.program_id(0) % blocks
    half = tl.program_id(0) // blocks
    column = block * T.lanes + tl.arange(0, T.lanes)
    exists = column < columns
    row = tl.arange(0, T.rows)[:, None]
    pitch = HALVES * columns
    offs = row * pitch + half * columns + column[None, :]
    total = tl.full((T.rows, T.lanes), 0.0, partials_ptr.dtype.element_ty)
    await_launch_before(PDL)
    for start in tl.range(0, rows, T.rows):
        theirs_ptr = partials_ptr + tl.cast(start, tl.int64) * pitch
        mask = (start + row < rows) & exists[None, :]
        total += tl.load(theirs_ptr + offs, mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    if first_ptr is None:
        store_as(second_ptr + column, sums, exists)
    elif second_ptr is None or half == 0:
        store_as(first_ptr + column, sums, exists)
    else:
        store_as(second_ptr + column, sums, exists)
