"""Forward, second launch (in eval the only one): y = act(a * (x - p) + b + z). Reads x, and z where there is
one, once; writes y once."""

import triton
import triton.language as tl

from .activations import activate, byte_tile, pack
from .coefficients import from_cells, from_running_statistics, store_table
from .statistics import PARAMETERS, SIZES
from .tiles import PLANES, RUNS, by_lane, lanes_and_channels, place, start_of, tile

# where the coefficients of a transform come from
TABLE = tl.constexpr(0)  # [3 and more, channels]: p, a, b
STATISTICS = tl.constexpr(1)  # eval: the running statistics; a table_ptr receives them for the backward
CELLS = tl.constexpr(2)  # [2, cells] mean and rstd, weight and bias


@triton.jit
def load_coefficient(table_ptr, row: tl.constexpr, offs_c, mask_c, channels):
    return tl.load(table_ptr + row * channels + offs_c, mask=mask_c, other=0.0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def transform_kernel(
    x_ptr, y_ptr, table_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr, z_ptr, signs_ptr,
    eps: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells,
    MODE: tl.constexpr, VEC: tl.constexpr, ROWS_A_TILE: tl.constexpr, LANES: tl.constexpr,
    STEP: tl.constexpr, SOURCE: tl.constexpr, CENTRED: tl.constexpr,
    NAME: tl.constexpr, PARAMETER: tl.constexpr,
):  # fmt: skip
    """SOURCE: where the coefficients come from, see below. not CENTRED: y = a * x, which is the whole
    backward of eval when no parameter needs a gradient. NAME, PARAMETER: of the activation, see
    activations.py. signs: a bit for each element of x, 1 where relu lets it through."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block, split, sample = place(tl.program_id(0), blocks, splits)
    offs_c, mask_c = lanes_and_channels(block, pitch_v, width_v, inner, channels, MODE, VEC, LANES, STEP)
    if SOURCE == STATISTICS:
        p, a, b, rstd = from_running_statistics(
            offs_c, mask_c, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, eps, ACC
        )  # fmt: skip
        if table_ptr is not None:
            first = mask_c & (split == 0)
            if MODE == PLANES:  # a channel has many lanes: the first one speaks for it
                first = first & ((block * (width_v * VEC) + tl.arange(0, LANES // STEP) * STEP) % inner == 0)
            elif MODE != RUNS:
                first = first & (block * (width_v * VEC) + tl.arange(0, LANES) < channels)
            store_table(table_ptr, offs_c, first, channels, p, a, b, rstd)
    elif SOURCE == CELLS:
        p, a, b = from_cells(
            offs_c, mask_c, sample, channels, group, cells, table_ptr, weight_ptr, bias_ptr, ACC
        )  # fmt: skip
    else:
        p = load_coefficient(table_ptr, 0, offs_c, mask_c, channels)
        a = load_coefficient(table_ptr, 1, offs_c, mask_c, channels)
        b = load_coefficient(table_ptr, 2, offs_c, mask_c, channels)
    p, a, b = by_lane(p, LANES, STEP), by_lane(a, LANES, STEP), by_lane(b, LANES, STEP)
    if batches_ptr is not None:  # num_batches_tracked: read by the first launch, so written here
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    start = start_of(sample, total_v, VEC)
    for step in tl.range(split, tiles, splits):
        index = tiles - 1 - step  # backwards: the end of x is what the first launch left in L2
        base, offs, mask, _ = tile(
            block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, ROWS_A_TILE, LANES
        )  # fmt: skip
        base += start
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        y = a * (x - p) + b if CENTRED else a * x
        if z_ptr is not None:
            y += tl.load(z_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        activated = activate(y, NAME, PARAMETER).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + base + offs, activated, mask=mask, eviction_policy="evict_first")
        if signs_ptr is not None:  # behind the other store: before it, Triton 3.9 spills a register [sass]
            byte_base, byte_offs, byte_mask = byte_tile(
                block, index, rows, pitch_v, width_v, pieces, total_v, MODE, VEC, ROWS_A_TILE, LANES
            )  # fmt: skip
            tl.store(signs_ptr + start // 8 + byte_base + byte_offs, pack(y > 0), mask=byte_mask)
