"""Forward, second launch (in eval the only one): y = act(a * (x - p) + b + z). Reads x, and z where there is
one, once; writes y once."""

import triton
import triton.language as tl

from .activations import activate, pack
from .geometry import by_lane, lanes_and_channels, place, start_of, tile
from .normalizers.batch_norm import from_running_statistics, store_table
from .normalizers.common import Channels, Parameters
from .records import Geometry
from .statistics import PARAMETERS, SIZES


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def transform_kernel(
    x_ptr, y_ptr, table_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr, z_ptr, signs_ptr,
    eps: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells,
    T: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """NORM: a Normalizer, whose coefficients these are, or None: the running statistics, as in eval, where a
    table_ptr receives them for the backward. not CENTRED: y = a * x, which is the whole backward of eval when
    no parameter needs a gradient. ACT: the activation, see activations.py. signs: a bit for each element of
    x, 1 where relu lets it through."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group, cells
    )
    of = Parameters(weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr)
    block, split, sample = place(tl.program_id(0), g)
    offs_c, mask_c = lanes_and_channels(block, g, T)
    c = Channels(offs_c, mask_c)
    if NORM is None:
        p, a, b, rstd = from_running_statistics(c, of, eps, ACC)
        if table_ptr is not None:
            first = mask_c & (split == 0)
            if T.mode == "planes":  # a channel has many lanes: the first one speaks for it
                lane = tl.arange(0, T.lanes // T.step) * T.step
                first = first & ((block * (g.width_v * T.vec) + lane) % g.inner == 0)
            elif T.mode != "runs":
                first = first & (block * (g.width_v * T.vec) + tl.arange(0, T.lanes) < g.channels)
            store_table(table_ptr, offs_c, first, g.channels, p, a, b, rstd)
    else:
        p, a, b = NORM.coefficients(c, sample, table_ptr, of, g, ACC)
    p, a, b = by_lane(p, T), by_lane(a, T), by_lane(b, T)
    if batches_ptr is not None:  # num_batches_tracked: read by the first launch, so written here
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    start = start_of(sample, g, T)
    for step in tl.range(split, g.tiles, g.splits):
        index = g.tiles - 1 - step  # backwards: the end of x is what the first launch left in L2
        t = tile(block, index, g, T)
        base = t.base + start
        x = tl.load(x_ptr + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_first").to(ACC)
        y = a * (x - p) + b if CENTRED else a * x
        if z_ptr is not None:
            y += tl.load(z_ptr + base + t.offs, mask=t.mask, other=0.0, eviction_policy="evict_first").to(ACC)
        activated = activate(y, ACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + base + t.offs, activated, mask=t.mask, eviction_policy="evict_first")
        if signs_ptr is not None:  # behind the other store: before it, Triton 3.9 spills a register [sass]
            bits = tile(block, index, g, T, False, True)
            tl.store(signs_ptr + start // 8 + bits.base + bits.offs, pack(y > 0), mask=bits.mask)
