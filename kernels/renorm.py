"""The middle stage of Batch Renormalization: Ioffe 2017, arXiv 1702.03275, algorithm 1."""

import triton
import triton.language as tl

from .coefficients import blend, load_or, reciprocal_std, store_as, store_table
from .moments import not_negative
from .tiles import as_scalar


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
def batch_renorm_forward(
    offs_c, mask_c, count, mean, m2, table_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    batches_ptr, channels, eps, momentum, r_max, d_max, warmup, r_steps, d_steps,
    CUMULATIVE: tl.constexpr, GUARDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """r and d come from the running statistics before this batch, and carry no gradient. The table is
    BatchNorm's with two rows more, r and d.

    What moves is sigma, eps inside: sigma += momentum * (sigma_B - sigma), kept as running_var = sigma^2 -
    eps. CUMULATIVE (momentum=None, set by who collects statistics anew): r = 1, d = 0, and the average of
    sigma over all batches. GUARDED: a channel of this batch that is not finite leaves its running
    statistics alone."""
    eps = as_scalar(eps, ACC)
    variance = m2 / tl.where(count > 0, count, 1.0)
    rstd = reciprocal_std(variance, eps, ACC)
    sigma_batch = root(variance + eps, ACC)
    old_mean = load_or(running_mean_ptr, offs_c, mask_c, 0.0, ACC)
    old_sigma = root(load_or(running_var_ptr, offs_c, mask_c, 1.0, ACC) + eps, ACC)
    batches = tl.zeros((1,), ACC)
    if batches_ptr is not None:
        batches = tl.load(batches_ptr + tl.arange(0, 1)).to(ACC)
    if CUMULATIVE:
        r = tl.full(mean.shape, 1.0, ACC)
        d = tl.zeros(mean.shape, ACC)
        factor = 1.0 / (batches + 1)
    else:
        r_limit = limit(1.0, as_scalar(r_max, ACC), batches, as_scalar(warmup, ACC), as_scalar(r_steps, ACC))
        d_limit = limit(0.0, as_scalar(d_max, ACC), batches, as_scalar(warmup, ACC), as_scalar(d_steps, ACC))
        r = clip(sigma_batch / old_sigma, 1.0 / r_limit, r_limit)
        d = clip((mean - old_mean) / old_sigma, -d_limit, d_limit)
        factor = as_scalar(momentum, ACC)
    gamma = load_or(weight_ptr, offs_c, mask_c, 1.0, ACC)
    beta = load_or(bias_ptr, offs_c, mask_c, 0.0, ACC)
    store_table(table_ptr, offs_c, mask_c, channels, mean, gamma * r * rstd, beta + gamma * d, rstd)
    tl.store(table_ptr + 4 * channels + offs_c, r, mask=mask_c)
    tl.store(table_ptr + 5 * channels + offs_c, d, mask=mask_c)
    updated = mask_c
    if GUARDED:
        updated = mask_c & (tl.abs(mean) < float("inf")) & (sigma_batch < float("inf"))
    blend(running_mean_ptr, offs_c, updated, mean, factor, ACC)
    sigma = old_sigma + factor * (sigma_batch - old_sigma)
    store_as(running_var_ptr + offs_c, not_negative(sigma * sigma - eps), updated)


@triton.jit
def root(value, ACC: tl.constexpr):
    return tl.sqrt_rn(value) if ACC == tl.float32 else tl.sqrt(value)
