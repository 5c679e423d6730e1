"""GroupNorm (Wu and He 2018): a group is some channels of one sample. InstanceNorm has as many groups as
channels: its groups need no merge, nor do contiguous groups, which are reduced as if they were channels.

stats is [2, groups], mean and rstd; dx_coeffs is [2, groups], c_xmu and c_one. gamma and beta are applied to
each channel where they are loaded."""

import triton
import triton.language as tl

from ..memory import Channels, as_scalar, load_or, load_row, load_shared, store_rows
from ..moments import Moments, load_channels, merge, merge_along, no_moments
from .common import GradientSums, Normalizer, is_last_program, load_nothing, reciprocal_std


@triton.jit
def group_rstd(variance, eps, ACC: tl.constexpr):
    """reciprocal_std, but 0 where that divides by 0: a constant group is normalized to 0 and gets a
    gradient of 0. torch's InstanceNorm does so too; its GroupNorm gives NaN."""
    return tl.where(variance + eps == 0, 0.0, reciprocal_std(variance, eps, ACC))


@triton.jit
def store_group(stats_ptr, group, g, mean, variance, eps, ACC: tl.constexpr):
    tl.store(stats_ptr + group.offs, mean, mask=group.mask)
    rstd_ptr = stats_ptr + g.groups + group.offs
    tl.store(rstd_ptr, group_rstd(variance, as_scalar(eps, ACC), ACC), mask=group.mask)


@triton.jit
def finalize_channels(c, m, ws, params, options, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """A group is one channel, or is reduced as one."""
    group = Channels(ws.sample * g.channels + c.offs, c.mask)
    store_group(ws.stats_ptr, group, g, m.pivot + m.shift, m.m2 / m.count, options.eps, ACC)


@triton.jit
def finalize_groups(c, m, ws, params, options, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """The channels of a group may lie in several blocks, so the last of a sample's blocks merges them."""
    tl.debug_barrier()  # slot 0 of the partial results is overwritten, which other threads have read
    store_rows(ws.sample_ptr, c, g.channels, m.pivot, m.shift, m.m2)
    all_blocks = tl.num_programs(0) // g.splits
    if is_last_program(ws.semaphores_ptr + all_blocks + ws.sample, g.blocks):
        groups_per_sample = g.channels // g.group_size
        for start in tl.range(0, groups_per_sample, T.groups_per_iter):
            offs_g = start + tl.arange(0, T.groups_per_iter)
            mean, variance = merge_groups(
                ws.sample_ptr, offs_g, groups_per_sample, tl.max(m.count, 0), g, T, ACC
            )
            group = Channels(ws.sample * groups_per_sample + offs_g, offs_g < groups_per_sample)
            store_group(ws.stats_ptr, group, g, mean, variance, options.eps, ACC)


@triton.jit
def merge_groups(moments_ptr, offs_g, groups_per_sample, count, g, T: tl.constexpr, ACC: tl.constexpr):
    """(mean, variance) of a sample's groups offs_g, from its channels' moments, of `count` values each, as
    finalize_groups stores them."""
    found = no_moments(T.groups_per_iter, T.members_per_iter, ACC)
    for start in tl.range(0, g.group_size, T.members_per_iter):
        offs_m = start + tl.arange(0, T.members_per_iter)[None, :]
        mask = (offs_m < g.group_size) & (offs_g < groups_per_sample)[:, None]
        theirs_ptr = moments_ptr + offs_g[:, None] * g.group_size + offs_m
        pivot, shift, m2 = load_channels(theirs_ptr, mask, g)
        found = merge(found, Moments(tl.where(mask, count, 0.0), pivot, shift, m2))
    m = merge_along(found, 1)
    return m.pivot + m.shift, m.m2 / tl.where(m.count > 0, m.count, 1.0)


@triton.jit
def group_of_channel(c, sample, g):
    """The group that each of a sample's channels belongs to, counted over all samples."""
    return Channels(sample * (g.channels // g.group_size) + c.offs // g.group_size, c.mask)


@triton.jit
def coefficients(c, sample, stats_ptr, params, g, ACC: tl.constexpr):
    group = group_of_channel(c, sample, g)
    mean = load_row(stats_ptr, 0, group, g.groups)
    rstd = load_row(stats_ptr, 1, group, g.groups)
    scale = load_or(params.weight, c.offs, c.mask, 1.0, ACC) * rstd
    return mean, scale, load_or(params.bias, c.offs, c.mask, 0.0, ACC)


@triton.jit
def group_norm_dx_coeffs(rstd, sums, n):
    """(c_xmu, c_one) of groups of n values, from their sums weighted by gamma (Wu and He 2018):
    dx = rstd * (gamma * dy - sums.dy / n - (x - mean) * rstd^2 * sums.dy_xmu / n)."""
    return -rstd * (rstd * (rstd * (sums.dy_xmu / n))), -rstd * (sums.dy / n)


@triton.jit
def load_backward(c, sample, stats_ptr, params, g, ACC: tl.constexpr):
    """(gamma, rstd) of each channel."""
    rstd = load_row(stats_ptr, 1, group_of_channel(c, sample, g), g.groups)
    return load_or(params.weight, c.offs, c.mask, 1.0, ACC), rstd


@triton.jit
def store_dx_coefficients(group, rstd, sums, out, g, ACC: tl.constexpr):
    c_xmu, c_one = group_norm_dx_coeffs(rstd, sums, as_scalar(out.count, ACC))
    store_rows(out.dx_coeffs, group, g.groups, c_xmu, c_one)


@triton.jit
def store_parameter_sums(c, sums, ws, out, g):
    """Stores what this sample adds to dgamma and dbeta, if they are wanted."""
    if out.sums is not None:
        _, rstd = ws.loaded
        store_rows(out.sums + ws.sample * (2 * g.channels), c, g.channels, rstd * sums.dy_xmu, sums.dy)


@triton.jit
def finalize_channel_sums(c, sums, ws, params, out, g, T: tl.constexpr, ACC: tl.constexpr):
    store_parameter_sums(c, sums, ws, out, g)
    if out.dx_coeffs is not None:
        weight, rstd = ws.loaded
        group = Channels(ws.sample * g.channels + c.offs, c.mask)
        weighted = GradientSums(weight * sums.dy, weight * sums.dy_xmu)
        store_dx_coefficients(group, rstd, weighted, out, g, ACC)


@triton.jit
def finalize_group_sums(c, sums, ws, params, out, g, T: tl.constexpr, ACC: tl.constexpr):
    """See finalize_groups."""
    store_parameter_sums(c, sums, ws, out, g)
    if out.dx_coeffs is not None:
        tl.debug_barrier()
        store_rows(ws.sample_ptr, c, g.channels, sums.dy, sums.dy_xmu)
        if is_last_program(ws.semaphores_ptr + tl.num_programs(0) // g.splits + ws.sample, g.blocks):
            groups_per_sample = g.channels // g.group_size
            for start in tl.range(0, groups_per_sample, T.groups_per_iter):
                offs_g = start + tl.arange(0, T.groups_per_iter)
                group = Channels(ws.sample * groups_per_sample + offs_g, offs_g < groups_per_sample)
                rstd = load_row(ws.stats_ptr, 1, group, g.groups)
                weighted = merge_group_sums(
                    ws.sample_ptr, params.weight, offs_g, groups_per_sample, g, T, ACC
                )
                store_dx_coefficients(group, rstd, weighted, out, g, ACC)


@triton.jit
def merge_group_sums(sums_ptr, weight_ptr, offs_g, groups_per_sample, g, T: tl.constexpr, ACC: tl.constexpr):
    """The gradient sums of a sample's groups offs_g, weighted by gamma, from those of its channels,
    [2, channels]."""
    sum_wdy = tl.full((T.groups_per_iter, T.members_per_iter), 0.0, ACC)
    sum_wdy_xmu = tl.full((T.groups_per_iter, T.members_per_iter), 0.0, ACC)
    for start in tl.range(0, g.group_size, T.members_per_iter):
        offs_m = start + tl.arange(0, T.members_per_iter)[None, :]
        mask = (offs_m < g.group_size) & (offs_g < groups_per_sample)[:, None]
        offs_c = offs_g[:, None] * g.group_size + offs_m
        weight = load_or(weight_ptr, offs_c, mask, 1.0, ACC)
        # one address for both loads takes 200 instructions less than one for each [sass]
        theirs_ptr = sums_ptr + offs_c
        sum_wdy += weight * load_shared(theirs_ptr, mask)
        sum_wdy_xmu += weight * load_shared(theirs_ptr + g.channels, mask)
    return GradientSums(tl.sum(sum_wdy, 1), tl.sum(sum_wdy_xmu, 1))


@triton.jit
def dx_coefficients(c, sample, stats_ptr, dx_coeffs_ptr, params, g, ACC: tl.constexpr):
    group = group_of_channel(c, sample, g)
    rstd = load_row(stats_ptr, 1, group, g.groups)
    c_dy = load_or(params.weight, c.offs, c.mask, 1.0, ACC) * rstd
    return c_dy, load_row(dx_coeffs_ptr, 0, group, g.groups), load_row(dx_coeffs_ptr, 1, group, g.groups)


GROUPS = Normalizer(
    load_nothing, finalize_groups, coefficients, load_backward, finalize_group_sums, dx_coefficients
)
CHANNELS = Normalizer(
    load_nothing, finalize_channels, coefficients, load_backward, finalize_channel_sums, dx_coefficients
)
