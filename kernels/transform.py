"""Forward, second launch (in eval the only one): y = a * (x - p) + b. Reads x once, writes y once."""

import triton
import triton.language as tl

from .coefficients import from_running_statistics, store_table
from .statistics import PARAMETERS, SIZES
from .tiles import PLANES, RUNS, lanes_and_channels, tile


@triton.jit
def load_coefficient(table_ptr, row: tl.constexpr, offs_c, mask_c, channels):
    return tl.load(table_ptr + row * channels + offs_c, mask=mask_c, other=0.0)[None, :]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def transform_kernel(
    x_ptr, y_ptr, table_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    eps: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits,
    MODE: tl.constexpr, VEC: tl.constexpr, ROWS_A_TILE: tl.constexpr, LANES: tl.constexpr,
    EVAL: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """EVAL: the coefficients come from the running statistics, and table_ptr, where given, receives them
    for the backward. not CENTRED: y = a * x, which is the whole backward of eval when no parameter needs a
    gradient."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    offs_c, mask_c = lanes_and_channels(block, pitch_v, width_v, inner, channels, MODE, VEC, LANES)
    if EVAL:
        p, a, b, rstd = from_running_statistics(
            offs_c, mask_c, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, eps, ACC
        )  # fmt: skip
        if table_ptr is not None:
            first = mask_c & (split == 0)
            if MODE == PLANES:  # a channel has many lanes: the first one speaks for it
                first = first & ((block * (width_v * VEC) + tl.arange(0, LANES)) % inner == 0)
            elif MODE != RUNS:
                first = first & (block * (width_v * VEC) + tl.arange(0, LANES) < channels)
            store_table(table_ptr, offs_c, first, channels, p, a, b, rstd)
        p, a, b = p[None, :], a[None, :], b[None, :]
    else:
        p = load_coefficient(table_ptr, 0, offs_c, mask_c, channels)
        a = load_coefficient(table_ptr, 1, offs_c, mask_c, channels)
        b = load_coefficient(table_ptr, 2, offs_c, mask_c, channels)
    if batches_ptr is not None:  # num_batches_tracked: read by the first launch, so written here
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    for step in tl.range(split, tiles, splits):
        index = tiles - 1 - step  # backwards: the end of x is what the first launch left in L2
        base, offs, mask, _ = tile(
            block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, ROWS_A_TILE, LANES
        )  # fmt: skip
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        y = a * (x - p) + b if CENTRED else a * x
        tl.store(y_ptr + base + offs, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")
