"""Batch Renormalization: Ioffe 2017, arXiv 1702.03275, algorithm 1. BatchNorm's cells, corrected towards the
running statistics."""

import triton
import triton.language as tl

from ..geometry import as_scalar
from ..moments import not_negative
from .batch_norm import blend, coefficients, dx_coefficients, store_dx_coefficients, store_table
from .common import Normalizer, load_or, load_row, reciprocal_std, store_as


@triton.jit
def limit(start, end, batches, warmup, steps):
    """`start` for the first `warmup` batches, then a straight line to `end` at batch `steps`. Batches are
    counted before this one."""
    share = (batches - warmup) / tl.where(steps > warmup, steps - warmup, 1.0)
    share = tl.where(batches < warmup, 0.0, tl.where(batches >= steps, 1.0, share))
    return tl.where(share > 0.0, start + (end - start) * share, start)  # which may end at infinity


@triton.jit
def clip(value, low, high):
    """NaN stays NaN."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def finalize_forward(c, m, at, of, o, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """r and d come from the running statistics before this batch, and carry no gradient. The table is
    BatchNorm's with two rows more, r and d.

    What moves is sigma, eps inside: sigma += momentum * (sigma_B - sigma), kept as running_var = sigma^2 -
    eps. NORM.cumulative (momentum=None, set by who collects statistics anew): r = 1, d = 0, and the average
    of sigma over all batches. NORM.guarded: a channel of this batch that is not finite leaves its running
    statistics alone."""
    mean = m.pivot + m.shift
    eps = as_scalar(o.eps, ACC)
    variance = m.m2 / tl.where(m.count > 0, m.count, 1.0)
    rstd = reciprocal_std(variance, eps, ACC)
    sigma_batch = root(variance + eps, ACC)
    old_mean = load_or(of.running_mean, c.offs, c.mask, 0.0, ACC)
    old_sigma = root(load_or(of.running_var, c.offs, c.mask, 1.0, ACC) + eps, ACC)
    batches = tl.zeros((1,), ACC)
    if of.batches is not None:
        batches = tl.load(of.batches + tl.arange(0, 1)).to(ACC)
    if NORM.cumulative:
        r = tl.full(mean.shape, 1.0, ACC)
        d = tl.zeros(mean.shape, ACC)
        factor = 1.0 / (batches + 1)
    else:
        warmup = as_scalar(o.warmup, ACC)
        r_limit = limit(1.0, as_scalar(o.r_max, ACC), batches, warmup, as_scalar(o.r_steps, ACC))
        d_limit = limit(0.0, as_scalar(o.d_max, ACC), batches, warmup, as_scalar(o.d_steps, ACC))
        r = clip(sigma_batch / old_sigma, 1.0 / r_limit, r_limit)
        d = clip((mean - old_mean) / old_sigma, -d_limit, d_limit)
        factor = as_scalar(o.momentum, ACC)
    gamma = load_or(of.weight, c.offs, c.mask, 1.0, ACC)
    beta = load_or(of.bias, c.offs, c.mask, 0.0, ACC)
    store_table(at.table_ptr, c.offs, c.mask, g.channels, mean, gamma * r * rstd, beta + gamma * d, rstd)
    tl.store(at.table_ptr + 4 * g.channels + c.offs, r, mask=c.mask)
    tl.store(at.table_ptr + 5 * g.channels + c.offs, d, mask=c.mask)
    updated = c.mask
    if NORM.guarded:
        updated = c.mask & (tl.abs(mean) < float("inf")) & (sigma_batch < float("inf"))
    blend(of.running_mean, c.offs, updated, mean, factor, ACC)
    sigma = old_sigma + factor * (sigma_batch - old_sigma)
    store_as(of.running_var + c.offs, not_negative(sigma * sigma - eps), updated)


@triton.jit
def root(value, ACC: tl.constexpr):
    return tl.sqrt_rn(value) if ACC == tl.float32 else tl.sqrt(value)


@triton.jit
def finalize_backward(c, sums, at, of, to, g, T: tl.constexpr, ACC: tl.constexpr):
    """BatchNorm's, with r in a already; and the normalized value, which dgamma is about, is r * xhat + d."""
    rstd = tl.load(at.table_ptr + 3 * g.channels + c.offs, mask=c.mask, other=0.0)
    store_dx_coefficients(c, sums, at, to, g, rstd, ACC)
    if to.weight is not None:
        dweight = rstd * sums.gd
        r, d = load_row(at.table_ptr, 4, c, g), load_row(at.table_ptr, 5, c, g)
        store_as(to.weight + c.offs, r * dweight + d * sums.g, c.mask)
    if to.bias is not None:
        store_as(to.bias + c.offs, sums.g, c.mask)


BATCH_RENORM = Normalizer(finalize_forward, coefficients, finalize_backward, dx_coefficients)
