"""Merging counts, means and M2 (sums of squared deviations from the mean) without losing digits: Chan,
Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.

A mean travels as an unevaluated sum, pivot + shift: rounded to one fp32 at mean 1e4 and std 1, each partial
mean would be off by 5e-4, and the variance that is merged from their differences by 1e-5. A NaN or inf in
the data stays visible: `where` instead of `maximum`, which drops NaN."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import load_shared


@triton.jit
def finite_or_zero(value):
    """A pivot that is not finite would turn all of a program's sums into NaN where only one value is; 0 is
    always a valid pivot."""
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def not_negative(value):
    """max(value, 0) that keeps NaN."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def product(a, b):
    """a * b, to be summed over lanes, rounded before it is added to another lane's product.

    The compiler may contract a * b + c to one operation. Where c is the partner lane's product, each lane
    of a pair would round the other's product and not its own, and the two copies of their sum would differ
    in the last bit. An fma is not contracted, and no compiler drops its 0.0, which turns -0.0 into 0.0."""
    return tl.fma(a, b, 0.0)


@triton.jit
def product_in_tile(a, b, VEC: tl.constexpr, THREADS: tl.constexpr = 32):
    """a * b of a tile, to be summed along its rows. A thread that holds several neighbours of a row sums its
    own first, and products may be contracted into that; otherwise this is `product`. VEC: the neighbours that
    one load brings. THREADS: those of the smallest program."""
    if VEC == 1 or a.shape[0] * a.shape[1] < THREADS * VEC:
        result = product(a, b)
    else:
        result = a * b
    return result


class Moments(NamedTuple):
    """The count of some values, their mean, pivot + shift, and M2, the sum of squared deviations from it."""

    count: Any
    pivot: Any
    shift: Any
    m2: Any


@triton.jit
def no_moments(ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """Moments of no values, [ROWS, COLUMNS]."""
    zeros = tl.zeros((ROWS, COLUMNS), ACC)
    return Moments(zeros, zeros, zeros, zeros)


@triton.jit
def from_pivoted_sums(count, total, squares):
    """(shift, M2) from the sums of x - pivot and (x - pivot)^2 over `count` values; zeros if count is 0."""
    some = count > 0
    shift = tl.where(some, total / tl.where(some, count, 1.0), 0.0)
    return shift, tl.where(some, not_negative(squares - total * shift), 0.0)


@triton.jit
def merge(a, b):
    """The moments of two sets of values together."""
    total = a.count + b.count
    share = b.count / tl.where(total > 0, total, 1.0)
    pivot = tl.where(a.count > 0, a.pivot, b.pivot)
    delta = tl.where(b.count > 0, (b.pivot - pivot) + (b.shift - a.shift), 0.0)
    shift = a.shift + delta * share
    # In this order, (delta * (count * share)) * delta: delta^2 alone overflows for means near 1e20 where
    # count is 0.
    return Moments(total, pivot, shift, a.m2 + b.m2 + (delta * (a.count * share)) * delta)


@triton.jit
def merge_along(m, AXIS: tl.constexpr):
    """The moments of all sets along an axis together, in two steps, both about a value close to the mean, so
    that nothing cancels."""
    some = m.count > 0
    total = tl.sum(m.count, AXIS)
    centre = finite_or_zero(tl.max(tl.where(some, m.pivot, float("-inf")), AXIS))
    distance = tl.where(some, (m.pivot - tl.expand_dims(centre, AXIS)) + m.shift, 0.0)
    moved = tl.sum(product(m.count, distance), AXIS) / tl.where(total > 0, total, 1.0)
    rest = tl.where(some, distance - tl.expand_dims(moved, AXIS), 0.0)
    m2 = tl.sum(tl.where(some, m.m2, 0.0) + m.count * rest * rest, AXIS)
    return Moments(total, centre, moved, m2)


@triton.jit
def load_channels(ptr, mask, g):
    """(pivot, shift, M2) of channels, three rows that other programs have stored."""
    return (
        load_shared(ptr, mask),
        load_shared(ptr + g.channels, mask),
        load_shared(ptr + 2 * g.channels, mask),
    )
