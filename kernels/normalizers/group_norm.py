"""GroupNorm (Wu and He 2018): a cell is a group of channels of a sample. InstanceNorm is as many groups as
channels; its cells, and contiguous groups that are seen as channels, need no merge.

Tables hold what a cell's channels share: [2, cells] mean and rstd, [2, cells] k2 and k3. Weight and bias are
applied where they are loaded, for a channel each."""

import triton
import triton.language as tl

from ..geometry import as_scalar
from ..moments import Moments, load_channels, merge, merge_along, no_moments, store_channels
from .common import (
    Channels,
    GradientSums,
    Normalizer,
    arrive_last,
    load_or,
    reciprocal_std,
    store_sums,
)


@triton.jit
def cell_rstd(variance, eps, ACC: tl.constexpr):
    """reciprocal_std of a cell within a sample; 0 where that divides by 0, so that the values of a constant
    cell, which are their mean, are normalized to 0, and have a gradient of 0. (So does torch's InstanceNorm;
    its GroupNorm gives NaN.)"""
    return tl.where(variance + eps == 0, 0.0, reciprocal_std(variance, eps, ACC))


@triton.jit
def store_cell(table_ptr, cell, g, mean, variance, eps, ACC: tl.constexpr):
    tl.store(table_ptr + cell.offs, mean, mask=cell.mask)
    tl.store(table_ptr + g.cells + cell.offs, cell_rstd(variance, as_scalar(eps, ACC), ACC), mask=cell.mask)


@triton.jit
def finalize_channels(c, m, at, of, o, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """A cell is a channel."""
    cell = Channels(at.sample * g.channels + c.offs, c.mask)
    store_cell(at.table_ptr, cell, g, m.pivot + m.shift, m.m2 / m.count, o.eps, ACC)


@triton.jit
def finalize_groups(c, m, at, of, o, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """The channels of a group may lie in several blocks: the last of the sample's blocks merges them. Slot 0
    of the workspace is read by nobody else any more."""
    tl.debug_barrier()
    store_channels(at.sample_ptr, c.offs, c.mask, g, m.pivot, m.shift, m.m2)
    all_blocks = tl.num_programs(0) // g.splits
    if arrive_last(at.arrivals_ptr + all_blocks + at.sample, g.blocks):
        in_sample = g.channels // g.group
        for start in tl.range(0, in_sample, T.groups):
            offs_g = start + tl.arange(0, T.groups)
            mean, variance = merge_groups(at.sample_ptr, offs_g, in_sample, tl.max(m.count, 0), g, T, ACC)
            cell = Channels(at.sample * in_sample + offs_g, offs_g < in_sample)
            store_cell(at.table_ptr, cell, g, mean, variance, o.eps, ACC)


@triton.jit
def merge_groups(moments_ptr, offs_g, in_sample, count, g, T: tl.constexpr, ACC: tl.constexpr):
    """(mean, variance) of a sample's groups offs_g, of `in_sample`, from what store_channels has left of its
    channels, of `count` values each."""
    found = no_moments(T.groups, T.members, ACC)
    for start in tl.range(0, g.group, T.members):
        offs_m = start + tl.arange(0, T.members)[None, :]
        mask = (offs_m < g.group) & (offs_g < in_sample)[:, None]
        theirs_ptr = moments_ptr + offs_g[:, None] * g.group + offs_m
        pivot, shift, m2 = load_channels(theirs_ptr, mask, g)
        found = merge(found, Moments(tl.where(mask, count, 0.0), pivot, shift, m2))
    m = merge_along(found, 1)
    return m.pivot + m.shift, m.m2 / tl.where(m.count > 0, m.count, 1.0)


@triton.jit
def cells_of(offs_c, sample, g):
    """The cell that each of a sample's channels belongs to."""
    return sample * (g.channels // g.group) + offs_c // g.group


@triton.jit
def coefficients(c, sample, table_ptr, of, g, ACC: tl.constexpr):
    offs_cell = cells_of(c.offs, sample, g)
    p = tl.load(table_ptr + offs_cell, mask=c.mask, other=0.0)
    rstd = tl.load(table_ptr + g.cells + offs_cell, mask=c.mask, other=0.0)
    a = load_or(of.weight, c.offs, c.mask, 1.0, ACC) * rstd
    return p, a, load_or(of.bias, c.offs, c.mask, 0.0, ACC)


@triton.jit
def slopes(rstd, sums, n):
    """(k2, k3) of cells, from their gradient sums, weighted by gamma, over n values (Wu and He 2018):
    dx = rstd * (gamma * g - sums.g / n - (x - p) * rstd^2 * sums.gd / n)."""
    return -rstd * (rstd * (rstd * (sums.gd / n))), -rstd * (sums.g / n)


@triton.jit
def store_dx_coefficients(cell, sums, at, to, g, ACC: tl.constexpr):
    """k2 and k3 of cells, from their gradient sums, weighted by gamma."""
    rstd = tl.load(at.table_ptr + g.cells + cell.offs, mask=cell.mask, other=0.0)
    k2, k3 = slopes(rstd, sums, as_scalar(to.count, ACC))
    tl.store(to.coefficients + cell.offs, k2, mask=cell.mask)
    tl.store(to.coefficients + g.cells + cell.offs, k3, mask=cell.mask)


@triton.jit
def store_parameter_sums(c, sums, at, to, g):
    """What this sample adds to dgamma and dbeta, where they are wanted."""
    if to.sums is not None:
        rstd = tl.load(at.table_ptr + g.cells + cells_of(c.offs, at.sample, g), mask=c.mask, other=0.0)
        store_sums(to.sums + at.sample * (2 * g.channels), c, g, rstd * sums.gd, sums.g)


@triton.jit
def finalize_channel_sums(c, sums, at, of, to, g, T: tl.constexpr, ACC: tl.constexpr):
    store_parameter_sums(c, sums, at, to, g)
    if to.coefficients is not None:
        weight = load_or(of.weight, c.offs, c.mask, 1.0, ACC)
        cell = Channels(at.sample * g.channels + c.offs, c.mask)
        weighted = GradientSums(weight * sums.g, weight * sums.gd)
        store_dx_coefficients(cell, weighted, at, to, g, ACC)


@triton.jit
def finalize_group_sums(c, sums, at, of, to, g, T: tl.constexpr, ACC: tl.constexpr):
    """As finalize_groups."""
    store_parameter_sums(c, sums, at, to, g)
    if to.coefficients is not None:
        tl.debug_barrier()
        store_sums(at.sample_ptr, c, g, sums.g, sums.gd)
        if arrive_last(at.arrivals_ptr + tl.num_programs(0) // g.splits + at.sample, g.blocks):
            in_sample = g.channels // g.group
            for start in tl.range(0, in_sample, T.groups):
                offs_g = start + tl.arange(0, T.groups)
                weighted = merge_group_sums(at.sample_ptr, of.weight, offs_g, in_sample, g, T, ACC)
                cell = Channels(at.sample * in_sample + offs_g, offs_g < in_sample)
                store_dx_coefficients(cell, weighted, at, to, g, ACC)


@triton.jit
def merge_group_sums(sums_ptr, weight_ptr, offs_g, in_sample, g, T: tl.constexpr, ACC: tl.constexpr):
    """The gradient sums of a sample's groups offs_g, of `in_sample`, weighted by gamma, from [2, channels] of
    its channels."""
    sum_wg = tl.full((T.groups, T.members), 0.0, ACC)
    sum_wgd = tl.full((T.groups, T.members), 0.0, ACC)
    for start in tl.range(0, g.group, T.members):
        offs_m = start + tl.arange(0, T.members)[None, :]
        mask = (offs_m < g.group) & (offs_g < in_sample)[:, None]
        offs_c = offs_g[:, None] * g.group + offs_m
        weight = load_or(weight_ptr, offs_c, mask, 1.0, ACC)
        # one address for both loads: 200 instructions less than a sum of pointers for each [sass]
        theirs_ptr = sums_ptr + offs_c
        sum_wg += weight * tl.load(theirs_ptr, mask=mask, other=0.0, cache_modifier=".cg")
        sum_wgd += weight * tl.load(theirs_ptr + g.channels, mask=mask, other=0.0, cache_modifier=".cg")
    return GradientSums(tl.sum(sum_wg, 1), tl.sum(sum_wgd, 1))


@triton.jit
def dx_coefficients(c, sample, table_ptr, gradients_ptr, of, g, ACC: tl.constexpr):
    offs_cell = cells_of(c.offs, sample, g)
    rstd = tl.load(table_ptr + g.cells + offs_cell, mask=c.mask, other=0.0)
    k1 = load_or(of.weight, c.offs, c.mask, 1.0, ACC) * rstd
    k2 = tl.load(gradients_ptr + offs_cell, mask=c.mask, other=0.0)
    return k1, k2, tl.load(gradients_ptr + g.cells + offs_cell, mask=c.mask, other=0.0)


GROUPS = Normalizer(finalize_groups, coefficients, finalize_group_sums, dx_coefficients)
CHANNELS = Normalizer(finalize_channels, coefficients, finalize_channel_sums, dx_coefficients)
