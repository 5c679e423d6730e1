"""The middle stage, per cell: what the moments (or the gradient sums) of a cell mean for its elements.

A new normalizer is a new function here (Batch Renormalization's is in renorm.py). It runs once a cell, in the
last program to finish. BatchNorm's coefficient table is [4, channels]: p, a, b and rstd, so that y = a * (x -
p) + b; the backward's is [3, channels]: k1, k2, k3, so that dx = k1 * g + k2 * (x - p) + k3. p is the mean
itself: folded into b it costs three digits at mean 1e4. Where cells lie within a sample, tables hold what a
cell's channels share: [2, cells] mean and rstd, [2, cells] k2 and k3."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .geometry import as_scalar

# What a cell, a set of elements that share statistics, is (the kernels' NORM):
#     "batch"   a channel, over all samples
#     "renorm"  the same, corrected towards the running statistics
#     "cell"    a channel of the view within a sample
#     "group"   Geometry.group neighbouring channels within a sample


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


class Channels(NamedTuple):
    """Channels that a program has the moments or gradient sums of, and which of them exist."""

    offs: Any
    mask: Any


class Parameters(NamedTuple):
    """What a layer keeps of each channel, and its counter of batches: pointers, or None."""

    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    batches: Any


class Options(NamedTuple):
    """Numbers of a forward. Batch Renormalization's limits, and their schedule, are in renorm.py."""

    eps: Any
    momentum: Any
    r_max: Any
    d_max: Any
    warmup: Any
    r_steps: Any
    d_steps: Any


@triton.jit
def batch_norm_forward(c, m, table_ptr, of, o, g, CUMULATIVE: tl.constexpr, ACC: tl.constexpr):
    """Ioffe and Szegedy 2015, algorithm 1, of channels c with moments m: a = gamma * rstd, b = beta. Running
    variance is the unbiased one, as in torch.

    CUMULATIVE (momentum=None): the factor is 1 / (batches + 1), read from the device; the second launch
    counts the batch."""
    mean = m.pivot + m.shift
    variance = m.m2 / tl.where(m.count > 0, m.count, 1.0)
    rstd = reciprocal_std(variance, as_scalar(o.eps, ACC), ACC)
    scale = load_or(of.weight, c.offs, c.mask, 1.0, ACC) * rstd
    beta = load_or(of.bias, c.offs, c.mask, 0.0, ACC)
    store_table(table_ptr, c.offs, c.mask, g.channels, mean, scale, beta, rstd)
    if CUMULATIVE:
        factor = 1.0 / (tl.load(of.batches + tl.arange(0, 1)) + 1).to(ACC)
    else:
        factor = as_scalar(o.momentum, ACC)
    if of.running_mean is not None:
        blend(of.running_mean, c.offs, c.mask, mean, factor, ACC)
    if of.running_var is not None:
        unbiased = m.m2 / tl.where(m.count > 1, m.count - 1, 1.0)
        blend(of.running_var, c.offs, c.mask, unbiased, factor, ACC)


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
def store_cell(table_ptr, cell, g, mean, variance, eps, ACC: tl.constexpr):
    """Cells within a sample: a table [2, cells] of mean and rstd. Weight and bias are applied where they are
    loaded, for a channel each."""
    tl.store(table_ptr + cell.offs, mean, mask=cell.mask)
    tl.store(table_ptr + g.cells + cell.offs, cell_rstd(variance, as_scalar(eps, ACC), ACC), mask=cell.mask)


@triton.jit
def cells_of(offs_c, sample, g):
    """The cell that each of a sample's channels belongs to."""
    return sample * (g.channels // g.group) + offs_c // g.group


@triton.jit
def from_cells(c, sample, table_ptr, of, g, ACC: tl.constexpr):
    """(p, a, b) of a sample's channels, from the table of cells."""
    offs_cell = cells_of(c.offs, sample, g)
    p = tl.load(table_ptr + offs_cell, mask=c.mask, other=0.0)
    rstd = tl.load(table_ptr + g.cells + offs_cell, mask=c.mask, other=0.0)
    a = load_or(of.weight, c.offs, c.mask, 1.0, ACC) * rstd
    return p, a, load_or(of.bias, c.offs, c.mask, 0.0, ACC)


@triton.jit
def from_running_statistics(c, of, eps, ACC: tl.constexpr):
    """Eval: (p, a, b, rstd) from the running statistics."""
    variance = load_or(of.running_var, c.offs, c.mask, 1.0, ACC)
    rstd = reciprocal_std(variance, as_scalar(eps, ACC), ACC)
    p = load_or(of.running_mean, c.offs, c.mask, 0.0, ACC)
    a = load_or(of.weight, c.offs, c.mask, 1.0, ACC) * rstd
    return p, a, load_or(of.bias, c.offs, c.mask, 0.0, ACC), rstd


class GradientSums(NamedTuple):
    """Of channels, or of cells and then weighted by gamma: the sums of g and of g * (x - p)."""

    g: Any
    gd: Any


class Gradients(NamedTuple):
    """Where a backward's results go: pointers, or None."""

    coefficients: Any  # [3, channels] or [2, cells]
    weight: Any
    bias: Any


@triton.jit
def batch_norm_backward(c, sums, table_ptr, to, count, g, RENORMED: tl.constexpr, ACC: tl.constexpr):
    """From the gradient sums of channels c: the derivative of algorithm 1, and dgamma, dbeta.

    dx = a * (g - sum_g / n - (x - p) * rstd^2 * sum_gd / n). Batch Renormalization has its r in a already,
    and its normalized value, which dgamma is about, is r * xhat + d."""
    rstd = tl.load(table_ptr + 3 * g.channels + c.offs, mask=c.mask, other=0.0)
    if to.coefficients is not None:
        a = tl.load(table_ptr + g.channels + c.offs, mask=c.mask, other=0.0)
        n = as_scalar(count, ACC)
        k2_ptr = to.coefficients + g.channels + c.offs
        tl.store(to.coefficients + c.offs, a, mask=c.mask)
        tl.store(k2_ptr, -a * (rstd * (rstd * (sums.gd / n))), mask=c.mask)
        tl.store(to.coefficients + 2 * g.channels + c.offs, -a * (sums.g / n), mask=c.mask)
    if to.weight is not None:
        dweight = rstd * sums.gd
        if RENORMED:
            r = tl.load(table_ptr + 4 * g.channels + c.offs, mask=c.mask, other=0.0)
            d = tl.load(table_ptr + 5 * g.channels + c.offs, mask=c.mask, other=0.0)
            dweight = r * dweight + d * sums.g
        store_as(to.weight + c.offs, dweight, c.mask)
    if to.bias is not None:
        store_as(to.bias + c.offs, sums.g, c.mask)


@triton.jit
def slopes(rstd, sums, n):
    """(k2, k3) of cells, from their gradient sums, weighted by gamma, over n values (Wu and He 2018):
    dx = rstd * (gamma * g - sums.g / n - (x - p) * rstd^2 * sums.gd / n)."""
    return -rstd * (rstd * (rstd * (sums.gd / n))), -rstd * (sums.g / n)


@triton.jit
def group_norm_backward(cell, sums, table_ptr, gradients_ptr, count, g, ACC: tl.constexpr):
    """Stores what `slopes` says of the cells."""
    rstd = tl.load(table_ptr + g.cells + cell.offs, mask=cell.mask, other=0.0)
    k2, k3 = slopes(rstd, sums, as_scalar(count, ACC))
    tl.store(gradients_ptr + cell.offs, k2, mask=cell.mask)
    tl.store(gradients_ptr + g.cells + cell.offs, k3, mask=cell.mask)
