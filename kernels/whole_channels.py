"""BatchNorm and Batch Renormalization in one launch each way, where a program has whole channels: it reduces
them, finalizes them and writes their results. Nothing is handed to other programs. A program whose channels
are one tile keeps that in registers and reads x once; another one reads x again, most of it from the caches.

batch_plan.py says where this is faster than two launches. The pieces are those of the two-launch kernels (see
reduce.py and elementwise.py)."""

import triton
import triton.language as tl

from .activations import Affine, before_activation
from .elementwise import Results, finish_tile
from .geometry import (
    by_lane,
    channels_of_block,
    channels_per_block,
    lanes_and_channels,
    row_of_channels,
    sum_by_channel,
    sum_rows,
    tile,
)
from .memory import read, write
from .normalizers.common import (
    Gradients,
    GradientSums,
    Options,
    Parameters,
    Workspace,
    is_last_program,
)
from .records import Geometry
from .reduce import (
    PARAMETERS,
    SIZES,
    Sources,
    gradient_sums_of_tile,
    gradient_tile,
    moments_of_channels,
    sums_by_lane,
)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def batch_norm_kernel(
    x_ptr, y_ptr, stats_ptr, semaphores_ptr,
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, batches_ptr, residual_ptr, relu_mask_ptr,
    eps: tl.float64, momentum: tl.float64, r_max: tl.float64, d_max: tl.float64,
    warmup: tl.float64, r_steps: tl.float64, d_steps: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups,
    T: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """semaphores: given if NORM reads the counter of batches, which the last program to have done so then
    increments. The rest is as in statistics_kernel and transform_kernel."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups
    )
    counted_ptr = None if semaphores_ptr is None else batches_ptr
    params = Parameters(weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, counted_ptr)
    options = Options(eps, momentum, r_max, d_max, warmup, r_steps, d_steps)
    block = tl.program_id(0)
    offs_k = tl.arange(0, T.channels)
    mine = channels_of_block(block, offs_k, channels_per_block(g, T), g)
    if T.mode != "nhwc":  # whose lanes are channels, too many to keep so much of each meanwhile [sass]
        loaded = NORM.load_forward(mine, params, ACC)
    sums, raw = sums_by_lane(x_ptr, block, 0, g, T, ACC)
    if T.mode == "nhwc":
        loaded = NORM.load_forward(mine, params, ACC)
        tl.debug_barrier()  # all warps with a channel have loaded before one of them stores
    ws = Workspace(0, None, None, stats_ptr, loaded)
    m = moments_of_channels(sums, offs_k, mine, g, T)
    mean, scale, shift = NORM.finalize_forward(mine, m, ws, params, options, g, T, NORM, ACC)
    mean, scale = row_of_channels(mean, g, T), row_of_channels(scale, g, T)
    shift = row_of_channels(shift, g, T)
    to = Results(y_ptr, residual_ptr, relu_mask_ptr)
    if T.held:
        t = tile(block, 0, g, T)
        finish_tile(scale * (raw.to(ACC) - mean) + shift, to, t, block, 0, 0, g, T, ACT, ACC)
    else:
        for step in tl.range(0, g.tiles):
            index = g.tiles - 1 - step  # backwards: the end of x is what the caches still have
            t = tile(block, index, g, T)
            x = read(x_ptr + t.base + t.offs, t.mask).to(ACC)
            finish_tile(scale * (x - mean) + shift, to, t, block, index, 0, g, T, ACT, ACC)
    if batches_ptr is not None:
        increments = block == 0
        if semaphores_ptr is not None:
            increments = is_last_program(semaphores_ptr, g.blocks)
        if increments:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PARAMETERS)
def batch_norm_gradients_kernel(
    dy_ptr, x_ptr, dx_ptr, stats_ptr, dweight_ptr, dbias_ptr,
    residual_ptr, relu_mask_ptr, dresidual_ptr,
    count: tl.float64,
    rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups,
    T: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """As gradient_sums_kernel and gradient_transform_kernel."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    g = Geometry(
        rows, pitch_v, width_v, inner, channels, tiles, pieces, total_v, blocks, splits, group_size, groups
    )
    params = Parameters(None, None, None, None, None)
    block = tl.program_id(0)
    c = lanes_and_channels(block, g, T)
    mean, scale, shift = NORM.coefficients(c, 0, stats_ptr, params, g, ACC)
    mean, scale, shift = by_lane(mean, T), by_lane(scale, T), by_lane(shift, T)
    offs_k = tl.arange(0, T.channels)
    mine = channels_of_block(block, offs_k, channels_per_block(g, T), g)
    loaded = NORM.load_backward(mine, 0, stats_ptr, params, g, ACC)
    affine = Affine(mean, scale, shift)
    sources = Sources(dy_ptr, x_ptr, residual_ptr, relu_mask_ptr, dresidual_ptr)
    t = tile(block, g.tiles - 1, g, T)
    grad, x = gradient_tile(sources, t, block, g.tiles - 1, 0, affine, g, T, ACT, ACC)
    sum_dy, sum_dy_xmu = gradient_sums_of_tile(grad, x, mean, T, ACC)
    if not T.held:
        for index in tl.range(0, g.tiles - 1):
            t = tile(block, index, g, T)
            more_grad, more_x = gradient_tile(sources, t, block, index, 0, affine, g, T, ACT, ACC)
            more_dy, more_dy_xmu = gradient_sums_of_tile(more_grad, more_x, mean, T, ACC)
            sum_dy += more_dy
            sum_dy_xmu += more_dy_xmu
    sums = GradientSums(
        sum_by_channel(sum_rows(sum_dy, g, T), offs_k, g, T),
        sum_by_channel(sum_rows(sum_dy_xmu, g, T), offs_k, g, T),
    )
    out = Gradients(None, dweight_ptr, dbias_ptr, None, count)
    ws = Workspace(0, None, None, stats_ptr, loaded)
    c_xmu, c_one = NORM.finalize_backward(mine, sums, ws, params, out, g, T, ACC)
    c_xmu, c_one = row_of_channels(c_xmu, g, T), row_of_channels(c_one, g, T)
    if T.held:
        dx = scale * grad.to(ACC) + c_xmu * (x.to(ACC) - mean) + c_one
        write(dx_ptr + t.base + t.offs, dx, t.mask)
    else:
        for step in tl.range(0, g.tiles):
            t = tile(block, g.tiles - 1 - step, g, T)
            more_x = read(x_ptr + t.base + t.offs, t.mask).to(ACC)
            if dresidual_ptr is not None:
                more_grad = read(dresidual_ptr + t.base + t.offs, t.mask).to(ACC)
            else:
                more_grad = read(dy_ptr + t.base + t.offs, t.mask).to(ACC)
                if ACT.name != "none":
                    more_grad = before_activation(
                        more_grad, more_x, affine, None, t.offs, t.mask, ACT, ACC
                    )  # fmt: skip
            dx = scale * more_grad + c_xmu * (more_x - mean) + c_one
            write(dx_ptr + t.base + t.offs, dx, t.mask)
