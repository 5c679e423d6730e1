"""Batch Renormalization: Ioffe 2017, arXiv 1702.03275, algorithm 1. BatchNorm, corrected towards the running
statistics."""

import triton
import triton.language as tl

from ..memory import Channels, as_scalar, load_row, store_as, store_rows
from ..moments import not_negative
from .batch_norm import coefficients, coefficients_of_dx, dx_coefficients, ema_update, load_forward
from .common import Normalizer, reciprocal_std


@triton.jit
def limit(start, end, batches, warmup, steps):
    """A schedule: `start` for the first `warmup` batches, then linear to `end` at batch `steps`. This batch
    is not counted."""
    share = (batches - warmup) / tl.where(steps > warmup, steps - warmup, 1.0)
    share = tl.where(batches < warmup, 0.0, tl.where(batches >= steps, 1.0, share))
    return tl.where(share > 0.0, start + (end - start) * share, start)  # end may be infinity


@triton.jit
def clip(value, low, high):
    """value between low and high. NaN stays NaN."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def finalize_forward(c, m, ws, params, options, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """r and d come from the running statistics before this batch, and carry no gradient. stats has two rows
    more than BatchNorm's, r and d.

    The average is over sigma, which includes eps: sigma += momentum * (sigma_batch - sigma), stored as
    running_var = sigma^2 - eps. NORM.cumulative (momentum=None, for collecting statistics anew): r = 1, d =
    0, and the average is over all batches. NORM.guarded: a channel whose batch statistics are not finite
    keeps its running statistics."""
    mean = m.pivot + m.shift
    eps = as_scalar(options.eps, ACC)
    variance = m.m2 / tl.where(m.count > 0, m.count, 1.0)
    rstd = reciprocal_std(variance, eps, ACC)
    sigma_batch = root(variance + eps, ACC)
    old_mean, batches = ws.loaded.running_mean, ws.loaded.batches
    old_sigma = root(ws.loaded.running_var + eps, ACC)
    if NORM.cumulative:
        r = tl.full(mean.shape, 1.0, ACC)
        d = tl.zeros(mean.shape, ACC)
        factor = 1.0 / (batches + 1)
    else:
        warmup = as_scalar(options.warmup, ACC)
        r_limit = limit(1.0, as_scalar(options.r_max, ACC), batches, warmup, as_scalar(options.r_steps, ACC))
        d_limit = limit(0.0, as_scalar(options.d_max, ACC), batches, warmup, as_scalar(options.d_steps, ACC))
        r = clip(sigma_batch / old_sigma, 1.0 / r_limit, r_limit)
        d = clip((mean - old_mean) / old_sigma, -d_limit, d_limit)
        factor = as_scalar(options.momentum, ACC)
    gamma = ws.loaded.weight
    scale, shift = gamma * r * rstd, ws.loaded.bias + gamma * d
    store_rows(ws.stats_ptr, c, g.channels, mean, scale, shift, rstd)
    tl.store(ws.stats_ptr + 4 * g.channels + c.offs, r, mask=c.mask)
    tl.store(ws.stats_ptr + 5 * g.channels + c.offs, d, mask=c.mask)
    updated = c.mask
    if NORM.guarded:
        updated = c.mask & (tl.abs(mean) < float("inf")) & (sigma_batch < float("inf"))
    ema_update(params.running_mean, Channels(c.offs, updated), old_mean, mean, factor)
    sigma = old_sigma + factor * (sigma_batch - old_sigma)
    store_as(params.running_var + c.offs, not_negative(sigma * sigma - eps), updated)
    return mean, scale, shift


@triton.jit
def root(value, ACC: tl.constexpr):
    return tl.sqrt_rn(value) if ACC == tl.float32 else tl.sqrt(value)


@triton.jit
def load_backward(c, sample, stats_ptr, params, g, ACC: tl.constexpr):
    """(scale, rstd, r, d)."""
    return (
        load_row(stats_ptr, 1, c, g.channels), load_row(stats_ptr, 3, c, g.channels),
        load_row(stats_ptr, 4, c, g.channels), load_row(stats_ptr, 5, c, g.channels),
    )  # fmt: skip


@triton.jit
def finalize_backward(c, sums, ws, params, out, g, T: tl.constexpr, ACC: tl.constexpr):
    """As BatchNorm's. scale includes r, and the value that gamma multiplies is r * xhat + d."""
    scale, rstd, r, d = ws.loaded
    if out.weight is not None:
        dweight = rstd * sums.dy_xmu
        store_as(out.weight + c.offs, r * dweight + d * sums.dy, c.mask)
    if out.bias is not None:
        store_as(out.bias + c.offs, sums.dy, c.mask)
    return coefficients_of_dx(c, sums, out, g, scale, rstd, ACC)


BATCH_RENORM = Normalizer(
    load_forward, finalize_forward, coefficients, load_backward, finalize_backward, dx_coefficients
)  # fmt: skip
