"""The middle stage, per cell: what the moments (or the gradient sums) of a cell mean for its elements.

A new normalizer is a new function here (Batch Renormalization's is in renorm.py). It runs once a cell, in the
last program to finish. BatchNorm's coefficient table is [4, channels]: p, a, b and rstd, so that y = a * (x -
p) + b; the backward's is [3, channels]: k1, k2, k3, so that dx = k1 * g + k2 * (x - p) + k3. p is the mean
itself: folded into b it costs three digits at mean 1e4. Where cells lie within a sample, tables hold what a
cell's channels share: [2, cells] mean and rstd, [2, cells] k2 and k3."""

import triton
import triton.language as tl

from .tiles import as_scalar

# What a cell, a set of elements that share statistics, is (the kernels' NORM).
BATCH = tl.constexpr(0)  # a channel, over all samples
RENORM = tl.constexpr(1)  # the same, corrected towards the running statistics
CELL = tl.constexpr(2)  # a channel of the view within a sample
GROUP = tl.constexpr(3)  # `group` neighbouring channels within a sample


@triton.jit
def arrive_last(arrivals_ptr, expected):
    """True in the last of `expected` programs, with all that the others stored before in sight. Leaves the
    counter at 0.
    """
    tl.debug_barrier()  # every thread's stores before the one thread's atomic
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@triton.jit
def load_or(ptr, offs, mask, default: tl.constexpr, ACC: tl.constexpr):
    """An optional per-channel tensor, as ACC; `default` where there is none."""
    if ptr is None:
        value = tl.full(offs.shape, default, ACC)
    else:
        value = tl.load(ptr + offs, mask=mask, other=default)
        if value.dtype.primitive_bitwidth == 16:
            value = value.to(tl.float32)  # see store_as
        value = value.to(ACC)
    return value


@triton.jit
def store_as(ptrs, value, mask):
    """Stores value in the pointers' type. By way of fp32: nothing turns fp64 into bf16 in one step."""
    DTYPE: tl.constexpr = ptrs.dtype.element_ty
    if DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(ptrs, value.to(DTYPE), mask=mask)


@triton.jit
def reciprocal_std(variance, eps, ACC: tl.constexpr):
    return 1.0 / tl.sqrt_rn(variance + eps) if ACC == tl.float32 else 1.0 / tl.sqrt(variance + eps)


@triton.jit
def cell_rstd(variance, eps, ACC: tl.constexpr):
    """reciprocal_std of a cell within a sample; 0 where that divides by 0, so that the values of a constant
    cell, which are their mean, are normalized to 0, and have a gradient of 0. (So does torch's InstanceNorm;
    its GroupNorm gives NaN.)"""
    return tl.where(variance + eps == 0, 0.0, reciprocal_std(variance, eps, ACC))


@triton.jit
def batch_norm_forward(
    offs_c,
    mask_c,
    count,
    mean,
    m2,
    table_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    channels,
    eps,
    momentum,
    CUMULATIVE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Ioffe and Szegedy 2015, algorithm 1: a = gamma * rstd, b = beta. Running variance is the unbiased
    one, as in torch.

    CUMULATIVE (momentum=None): the factor is 1 / (batches + 1), read from the device; the second launch
    counts the batch."""
    variance = m2 / tl.where(count > 0, count, 1.0)
    rstd = reciprocal_std(variance, as_scalar(eps, ACC), ACC)
    scale = load_or(weight_ptr, offs_c, mask_c, 1.0, ACC) * rstd
    store_table(
        table_ptr, offs_c, mask_c, channels, mean, scale, load_or(bias_ptr, offs_c, mask_c, 0.0, ACC), rstd
    )
    if CUMULATIVE:
        factor = 1.0 / (tl.load(batches_ptr + tl.arange(0, 1)) + 1).to(ACC)
    else:
        factor = as_scalar(momentum, ACC)
    if running_mean_ptr is not None:
        blend(running_mean_ptr, offs_c, mask_c, mean, factor, ACC)
    if running_var_ptr is not None:
        blend(running_var_ptr, offs_c, mask_c, m2 / tl.where(count > 1, count - 1, 1.0), factor, ACC)


@triton.jit
def blend(running_ptr, offs_c, mask_c, value, factor, ACC: tl.constexpr):
    old = load_or(running_ptr, offs_c, mask_c, 0.0, ACC)
    new = (1 - factor) * old + factor * value  # as torch's: a NaN batch shows even with momentum 0
    store_as(running_ptr + offs_c, new, mask_c)


@triton.jit
def store_table(table_ptr, offs_c, mask_c, channels, p, a, b, rstd):
    tl.store(table_ptr + offs_c, p, mask=mask_c)
    tl.store(table_ptr + channels + offs_c, a, mask=mask_c)
    tl.store(table_ptr + 2 * channels + offs_c, b, mask=mask_c)
    tl.store(table_ptr + 3 * channels + offs_c, rstd, mask=mask_c)


@triton.jit
def store_cell(table_ptr, offs_cell, mask, cells, mean, variance, eps, ACC: tl.constexpr):
    """Cells within a sample: a table [2, cells] of mean and rstd. Weight and bias are applied where they are
    loaded, for a channel each."""
    tl.store(table_ptr + offs_cell, mean, mask=mask)
    tl.store(table_ptr + cells + offs_cell, cell_rstd(variance, as_scalar(eps, ACC), ACC), mask=mask)


@triton.jit
def from_cells(
    offs_c, mask_c, sample, channels, group, cells, table_ptr, weight_ptr, bias_ptr, ACC: tl.constexpr
):
    """(p, a, b) of a sample's channels, from the table of cells."""
    offs_cell = sample * (channels // group) + offs_c // group
    p = tl.load(table_ptr + offs_cell, mask=mask_c, other=0.0)
    rstd = tl.load(table_ptr + cells + offs_cell, mask=mask_c, other=0.0)
    a = load_or(weight_ptr, offs_c, mask_c, 1.0, ACC) * rstd
    return p, a, load_or(bias_ptr, offs_c, mask_c, 0.0, ACC)


@triton.jit
def from_running_statistics(
    offs_c, mask_c, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, eps, ACC: tl.constexpr
):  # fmt: skip
    """Eval: (p, a, b, rstd) from the running statistics."""
    rstd = reciprocal_std(load_or(running_var_ptr, offs_c, mask_c, 1.0, ACC), as_scalar(eps, ACC), ACC)
    p = load_or(running_mean_ptr, offs_c, mask_c, 0.0, ACC)
    a = load_or(weight_ptr, offs_c, mask_c, 1.0, ACC) * rstd
    return p, a, load_or(bias_ptr, offs_c, mask_c, 0.0, ACC), rstd


@triton.jit
def batch_norm_backward(
    offs_c,
    mask_c,
    sum_g,
    sum_gd,
    table_ptr,
    gradients_ptr,
    dweight_ptr,
    dbias_ptr,
    channels,
    count,
    RENORMED: tl.constexpr,
    ACC: tl.constexpr,
):
    """From sum g and sum g * (x - p): the derivative of algorithm 1, and dgamma, dbeta.

    dx = a * (g - sum_g / n - (x - p) * rstd^2 * sum_gd / n). Batch Renormalization has its r in a already,
    and its normalized value, which dgamma is about, is r * xhat + d."""
    rstd = tl.load(table_ptr + 3 * channels + offs_c, mask=mask_c, other=0.0)
    if gradients_ptr is not None:
        a = tl.load(table_ptr + channels + offs_c, mask=mask_c, other=0.0)
        n = as_scalar(count, ACC)
        tl.store(gradients_ptr + offs_c, a, mask=mask_c)
        tl.store(gradients_ptr + channels + offs_c, -a * (rstd * (rstd * (sum_gd / n))), mask=mask_c)
        tl.store(gradients_ptr + 2 * channels + offs_c, -a * (sum_g / n), mask=mask_c)
    if dweight_ptr is not None:
        dweight = rstd * sum_gd
        if RENORMED:
            r = tl.load(table_ptr + 4 * channels + offs_c, mask=mask_c, other=0.0)
            d = tl.load(table_ptr + 5 * channels + offs_c, mask=mask_c, other=0.0)
            dweight = r * dweight + d * sum_g
        store_as(dweight_ptr + offs_c, dweight, mask_c)
    if dbias_ptr is not None:
        store_as(dbias_ptr + offs_c, sum_g, mask_c)


@triton.jit
def slopes(rstd, sum_wg, sum_wgd, n):
    """(k2, k3) of cells, from their sums of gamma * g and gamma * g * (x - p) over n values (Wu and He 2018):
    dx = rstd * (gamma * g - sum_wg / n - (x - p) * rstd^2 * sum_wgd / n)."""
    return -rstd * (rstd * (rstd * (sum_wgd / n))), -rstd * (sum_wg / n)


@triton.jit
def group_norm_backward(
    offs_cell, mask, sum_wg, sum_wgd, table_ptr, gradients_ptr, cells, count, ACC: tl.constexpr
):  # fmt: skip
    """Stores what `slopes` says of the cells."""
    rstd = tl.load(table_ptr + cells + offs_cell, mask=mask, other=0.0)
    k2, k3 = slopes(rstd, sum_wg, sum_wgd, as_scalar(count, ACC))
    tl.store(gradients_ptr + offs_cell, k2, mask=mask)
    tl.store(gradients_ptr + cells + offs_cell, k3, mask=mask)
