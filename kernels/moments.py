"""Merging (count, mean, M2) without losing digits: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
variance", eq. 2.1. M2 is the sum of squared deviations from the mean. A NaN or inf in the data stays visible: `where`
instead of `maximum`, which drops NaN."""

import triton
import triton.language as tl


@triton.jit
def finite_or_zero(value):
    """A pivot that is not finite would turn a whole program's sums into NaN where only one value is; 0 is always legal."""
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def not_negative(value):
    """max(value, 0) that keeps NaN."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def from_pivoted_sums(count, pivot, total, squares):
    """mean and M2 from sums of (x - pivot) and (x - pivot)^2 over `count` values; zeros where count is 0."""
    some = count > 0
    shift = total / tl.where(some, count, 1.0)
    return tl.where(some, pivot + shift, 0.0), tl.where(some, not_negative(squares - total * shift), 0.0)


@triton.jit
def merge(count, mean, m2, count_b, mean_b, m2_b):
    """Two sets of moments into one."""
    total = count + count_b
    share = count_b / tl.where(total > 0, total, 1.0)
    delta = tl.where(count_b > 0, mean_b - mean, 0.0)
    # (delta * (count * share)) * delta, in this order: delta^2 alone overflows for means near 1e20 while count is 0
    return total, mean + delta * share, m2 + m2_b + (delta * (count * share)) * delta


@triton.jit
def merge_along(count, mean, m2, AXIS: tl.constexpr):
    """All sets of moments along an axis into one. Two steps, both about a value close to the mean, so that nothing cancels."""
    some = count > 0
    total = tl.sum(count, AXIS)
    pivot = tl.expand_dims(finite_or_zero(tl.max(tl.where(some, mean, float("-inf")), AXIS)), AXIS)
    distance = tl.where(some, mean - pivot, 0.0)
    shift = tl.expand_dims(tl.sum(count * distance, AXIS) / tl.where(total > 0, total, 1.0), AXIS)
    rest = tl.where(some, distance - shift, 0.0)
    merged = tl.sum(tl.where(some, m2, 0.0) + count * rest * rest, AXIS)
    return total, tl.sum(pivot + shift, AXIS), merged
