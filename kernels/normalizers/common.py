"""What a normalizer hands to the kernels that reduce x and map it, and what normalizers share.

The kernels leave the moments, or the gradient sums, of channels to the last program of a block. What these
mean is the normalizer's to say: it finalizes them, once for each cell, a cell being a set of elements that
share statistics. Then it says which coefficients a lane has: forward p, a and b, so that y = a * (x - p) + b,
and backward k1, k2 and k3, so that dx = k1 * g + k2 * (x - p) + k3. p is the mean itself: folded into b it
costs three digits at mean 1e4."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


@dataclass(frozen=True)
class Normalizer:
    """A policy of jit functions, which kernels take as a compile-time constant, NORM.

    finalize_forward(c, m, at, of, o, g, T, NORM, ACC): the moments m of channels c -> the table.
    coefficients(c, sample, table_ptr, of, g, ACC): (p, a, b) of a sample's channels, from the table.
    finalize_backward(c, sums, at, of, to, g, T, ACC): their gradient sums -> the parameters' gradients, and
    what dx_coefficients(c, sample, table_ptr, gradients_ptr, of, g, ACC), (k1, k2, k3), reads.
    cumulative, guarded: of running statistics, see batch_norm.py and batch_renorm.py."""

    finalize_forward: Any
    coefficients: Any
    finalize_backward: Any
    dx_coefficients: Any
    cumulative: bool = False
    guarded: bool = False

    @property
    def cache_key(self) -> str:
        """By which Triton's cache on disk knows the functions' sources, which their names do not tell."""
        functions = (
            self.finalize_forward, self.coefficients, self.finalize_backward, self.dx_coefficients,
        )  # fmt: skip
        return "-".join([*(f.cache_key for f in functions), str((self.cumulative, self.guarded))])


class Workspace(NamedTuple):
    """Where a sample's programs hand over what they have found, the counters of the programs that have
    arrived (of each block, then of each sample), and the forward's table."""

    sample: Any
    sample_ptr: Any
    arrivals_ptr: Any
    table_ptr: Any


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


class GradientSums(NamedTuple):
    """Of channels, or of cells and then weighted by gamma: the sums of g and of g * (x - p)."""

    g: Any
    gd: Any


class Gradients(NamedTuple):
    """Where a backward's results go: pointers, or None. count: values a cell."""

    coefficients: Any  # what dx_coefficients reads
    weight: Any
    bias: Any
    sums: Any  # [samples, 2, channels]: what each sample adds to dgamma and dbeta
    count: Any


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
def load_row(table_ptr, row: tl.constexpr, c, g):
    """A row of a table [rows, channels], of channels c."""
    return tl.load(table_ptr + row * g.channels + c.offs, mask=c.mask, other=0.0)


@triton.jit
def store_sums(to_ptr, c, g, sum_g, sum_gd):
    """[2, channels]."""
    tl.store(to_ptr + c.offs, sum_g, mask=c.mask)
    tl.store(to_ptr + g.channels + c.offs, sum_gd, mask=c.mask)
