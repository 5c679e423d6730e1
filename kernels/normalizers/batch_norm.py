"""BatchNorm: a group is a channel over all samples. stats is [4, channels]: mean, scale, shift and rstd."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..memory import as_scalar, load_or, load_row, store_as, store_rows
from .common import Normalizer, load_nothing, reciprocal_std


class Loaded(NamedTuple):
    """A layer's values of some channels, before this batch; 1 and 0 for those that there are not."""

    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    batches: Any


@triton.jit
def load_forward(c, params, ACC: tl.constexpr):
    batches = tl.zeros((1,), ACC)
    if params.batches is not None:
        batches = tl.load(params.batches + tl.arange(0, 1)).to(ACC)
    return Loaded(
        load_or(params.weight, c.offs, c.mask, 1.0, ACC),
        load_or(params.bias, c.offs, c.mask, 0.0, ACC),
        load_or(params.running_mean, c.offs, c.mask, 0.0, ACC),
        load_or(params.running_var, c.offs, c.mask, 1.0, ACC),
        batches,
    )


@triton.jit
def finalize_forward(c, m, ws, params, options, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """Ioffe and Szegedy 2015, algorithm 1: scale = gamma * rstd, shift = beta. The running variance is
    unbiased, as in torch.

    NORM.cumulative (momentum=None): the factor of the average is 1 / (batches + 1), read from the device; the
    counter is incremented after all have read it."""
    mean = m.pivot + m.shift
    variance = m.m2 / tl.where(m.count > 0, m.count, 1.0)
    rstd = reciprocal_std(variance, as_scalar(options.eps, ACC), ACC)
    scale, shift = ws.loaded.weight * rstd, ws.loaded.bias
    store_rows(ws.stats_ptr, c, g.channels, mean, scale, shift, rstd)
    if NORM.cumulative:
        factor = 1.0 / (ws.loaded.batches + 1)
    else:
        factor = as_scalar(options.momentum, ACC)
    if params.running_mean is not None:
        ema_update(params.running_mean, c, ws.loaded.running_mean, mean, factor)
    if params.running_var is not None:
        unbiased = m.m2 / tl.where(m.count > 1, m.count - 1, 1.0)
        ema_update(params.running_var, c, ws.loaded.running_var, unbiased, factor)
    return mean, scale, shift


@triton.jit
def ema_update(running_ptr, c, old, value, factor):
    new = (1 - factor) * old + factor * value  # torch's formula: NaN passes through even with momentum 0
    store_as(running_ptr + c.offs, new, c.mask)


@triton.jit
def coefficients(c, sample, stats_ptr, params, g, ACC: tl.constexpr):
    return three_rows(stats_ptr, c, g)


@triton.jit
def three_rows(ptr, c, g):
    return (
        load_row(ptr, 0, c, g.channels), load_row(ptr, 1, c, g.channels), load_row(ptr, 2, c, g.channels),
    )  # fmt: skip


@triton.jit
def from_running_statistics(c, params, eps, ACC: tl.constexpr):
    """Eval: (mean, scale, shift, rstd)."""
    variance = load_or(params.running_var, c.offs, c.mask, 1.0, ACC)
    rstd = reciprocal_std(variance, as_scalar(eps, ACC), ACC)
    mean = load_or(params.running_mean, c.offs, c.mask, 0.0, ACC)
    scale = load_or(params.weight, c.offs, c.mask, 1.0, ACC) * rstd
    return mean, scale, load_or(params.bias, c.offs, c.mask, 0.0, ACC), rstd


@triton.jit
def load_backward(c, sample, stats_ptr, params, g, ACC: tl.constexpr):
    """(scale, rstd)."""
    return load_row(stats_ptr, 1, c, g.channels), load_row(stats_ptr, 3, c, g.channels)


@triton.jit
def coefficients_of_dx(c, sums, out, g, scale, rstd, ACC: tl.constexpr):
    """c_xmu and c_one; c_dy is the scale. All are stored, [3, channels], if a later launch needs them."""
    n = as_scalar(out.count, ACC)
    c_xmu, c_one = -scale * (rstd * (rstd * (sums.dy_xmu / n))), -scale * (sums.dy / n)
    if out.dx_coeffs is not None:
        store_rows(out.dx_coeffs, c, g.channels, scale, c_xmu, c_one)
    return c_xmu, c_one


@triton.jit
def finalize_backward(c, sums, ws, params, out, g, T: tl.constexpr, ACC: tl.constexpr):
    """The derivative of algorithm 1, with n values a channel:

    dx = scale * (dy - sums.dy / n - (x - mean) * rstd^2 * sums.dy_xmu / n)."""
    scale, rstd = ws.loaded
    if out.weight is not None:
        store_as(out.weight + c.offs, rstd * sums.dy_xmu, c.mask)
    if out.bias is not None:
        store_as(out.bias + c.offs, sums.dy, c.mask)
    return coefficients_of_dx(c, sums, out, g, scale, rstd, ACC)


@triton.jit
def dx_coefficients(c, sample, stats_ptr, dx_coeffs_ptr, params, g, ACC: tl.constexpr):
    return three_rows(dx_coeffs_ptr, c, g)


@triton.jit
def store_moments(c, m, ws, params, options, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """A reduction that stops at the moments, which the caller merges with those of others before anything is
    normalized. stats is [3, channels]: mean, M2 and count."""
    store_rows(ws.stats_ptr, c, g.channels, m.pivot + m.shift, m.m2, m.count)


_OTHERS = (coefficients, load_backward, finalize_backward, dx_coefficients)
BATCH_NORM = Normalizer(load_forward, finalize_forward, *_OTHERS)
MOMENTS = Normalizer(load_nothing, store_moments, *_OTHERS)
