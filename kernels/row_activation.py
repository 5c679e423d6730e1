"""Backward of LayerNorm through an activation, first launch: dresidual = dy * act'(v), where v = xhat *
gamma + beta + residual. The other launches read dresidual in place of dy, because their registers are full
(see row_plan.py)."""

import triton
import triton.language as tl

from .activations import times_slope
from .row_gradients import load_statistics
from .row_norm import STATS, group_of_rows, normalized

SIZES = ["rows", "width_v", "splits"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STATS)
def row_activation_kernel(
    dy_ptr, x_ptr, residual_ptr, dresidual_ptr, stats_ptr, weight_ptr, bias_ptr,
    rows, width_v, splits,
    T: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Program (group, split) takes every splits-th tile of a group of rows."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    R: tl.constexpr = T.rows
    LANES: tl.constexpr = T.lanes
    width = width_v * T.vec
    first = tl.program_id(0) // splits * R
    base, row, lane, inside = group_of_rows(first, rows, width, R, LANES)
    mean, rstd = load_statistics(stats_ptr, rows, first, row, inside)
    for piece in tl.range(tl.program_id(0) % splits, tl.cdiv(width, LANES), splits):
        column = piece * LANES + lane
        exists = column < width
        offs, mask = base + (row * width + column), inside & exists
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        wide = tl.broadcast_to(column, (R, LANES))
        v = normalized(x - mean, rstd, wide, exists, weight_ptr, bias_ptr, ACC)
        if residual_ptr is not None:
            v += tl.load(residual_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        dy = times_slope(dy, v, ACT)
        tl.store(dresidual_ptr + offs, dy.to(dresidual_ptr.dtype.element_ty), mask=mask)
