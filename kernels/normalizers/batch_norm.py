"""BatchNorm: a cell is a channel, over all samples. The table is [4, channels]: p, a, b and rstd."""

import triton
import triton.language as tl

from ..geometry import as_scalar
from .common import Normalizer, load_or, load_row, reciprocal_std, store_as


@triton.jit
def finalize_forward(c, m, at, of, o, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """Ioffe and Szegedy 2015, algorithm 1, of channels c with moments m: a = gamma * rstd, b = beta. Running
    variance is the unbiased one, as in torch.

    NORM.cumulative (momentum=None): the factor is 1 / (batches + 1), read from the device; the second launch
    counts the batch."""
    mean = m.pivot + m.shift
    variance = m.m2 / tl.where(m.count > 0, m.count, 1.0)
    rstd = reciprocal_std(variance, as_scalar(o.eps, ACC), ACC)
    scale = load_or(of.weight, c.offs, c.mask, 1.0, ACC) * rstd
    beta = load_or(of.bias, c.offs, c.mask, 0.0, ACC)
    store_table(at.table_ptr, c.offs, c.mask, g.channels, mean, scale, beta, rstd)
    if NORM.cumulative:
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
def coefficients(c, sample, table_ptr, of, g, ACC: tl.constexpr):
    return load_row(table_ptr, 0, c, g), load_row(table_ptr, 1, c, g), load_row(table_ptr, 2, c, g)


@triton.jit
def from_running_statistics(c, of, eps, ACC: tl.constexpr):
    """Eval: (p, a, b, rstd) from the running statistics."""
    variance = load_or(of.running_var, c.offs, c.mask, 1.0, ACC)
    rstd = reciprocal_std(variance, as_scalar(eps, ACC), ACC)
    p = load_or(of.running_mean, c.offs, c.mask, 0.0, ACC)
    a = load_or(of.weight, c.offs, c.mask, 1.0, ACC) * rstd
    return p, a, load_or(of.bias, c.offs, c.mask, 0.0, ACC), rstd


@triton.jit
def store_dx_coefficients(c, sums, at, to, g, rstd, ACC: tl.constexpr):
    """[3, channels], where dx is wanted."""
    if to.coefficients is not None:
        a = tl.load(at.table_ptr + g.channels + c.offs, mask=c.mask, other=0.0)
        n = as_scalar(to.count, ACC)
        k2_ptr = to.coefficients + g.channels + c.offs
        tl.store(to.coefficients + c.offs, a, mask=c.mask)
        tl.store(k2_ptr, -a * (rstd * (rstd * (sums.gd / n))), mask=c.mask)
        tl.store(to.coefficients + 2 * g.channels + c.offs, -a * (sums.g / n), mask=c.mask)


@triton.jit
def finalize_backward(c, sums, at, of, to, g, T: tl.constexpr, ACC: tl.constexpr):
    """From the gradient sums of channels c: the derivative of algorithm 1, and dgamma, dbeta.

    dx = a * (g - sum_g / n - (x - p) * rstd^2 * sum_gd / n)."""
    rstd = tl.load(at.table_ptr + 3 * g.channels + c.offs, mask=c.mask, other=0.0)
    store_dx_coefficients(c, sums, at, to, g, rstd, ACC)
    if to.weight is not None:
        store_as(to.weight + c.offs, rstd * sums.gd, c.mask)
    if to.bias is not None:
        store_as(to.bias + c.offs, sums.g, c.mask)


@triton.jit
def dx_coefficients(c, sample, table_ptr, gradients_ptr, of, g, ACC: tl.constexpr):
    return (
        load_row(gradients_ptr, 0, c, g),
        load_row(gradients_ptr, 1, c, g),
        load_row(gradients_ptr, 2, c, g),
    )


BATCH_NORM = Normalizer(finalize_forward, coefficients, finalize_backward, dx_coefficients)
