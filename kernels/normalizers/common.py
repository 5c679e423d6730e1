"""What a normalizer provides to the kernels that reduce x and to those that write results, and what
normalizers have in common.

A group is a set of elements that share statistics: a channel over all samples (BatchNorm), or a group of
channels of one sample (GroupNorm). The kernels hand the moments, or the gradient sums, of channels to the
last program of a block. There the normalizer finalizes them, and later it gives the coefficients of each
lane: forward mean, scale and shift, so that y = scale * (x - mean) + shift, and backward c_dy, c_xmu and
c_one, so that dx = c_dy * dy + c_xmu * (x - mean) + c_one. The mean stays apart, because folding it into
the shift loses three digits where mean / std is 1e4."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


@dataclass(frozen=True)
class Normalizer:
    """A policy of jit functions, which kernels take as a compile-time constant, NORM.

    load_forward(c, params, ACC) returns what finalize_forward needs beside the moments: it is loaded before
    these are waited for, and handed over as ws.loaded.
    finalize_forward(c, m, ws, params, options, g, T, NORM, ACC) turns the moments m of channels c into stats;
    BatchNorm's also returns what `coefficients` loads from there.
    coefficients(c, sample, stats_ptr, params, g, ACC) returns (mean, scale, shift) of a sample's channels.
    load_backward(c, sample, stats_ptr, params, g, ACC) is finalize_backward's.
    finalize_backward(c, sums, ws, params, out, g, T, ACC) turns their gradient sums into the parameters'
    gradients and into dx_coeffs, of which BatchNorm's returns c_xmu and c_one, and from which
    dx_coefficients(c, sample, stats_ptr, dx_coeffs_ptr, params, g, ACC) returns (c_dy, c_xmu, c_one).
    cumulative and guarded say how running statistics are updated: see batch_norm.py and batch_renorm.py."""

    load_forward: Any
    finalize_forward: Any
    coefficients: Any
    load_backward: Any
    finalize_backward: Any
    dx_coefficients: Any
    cumulative: bool = False
    guarded: bool = False

    @property
    def cache_key(self) -> str:
        """Triton's cache on disk needs the functions' sources: their names would not change with an edit."""
        functions = (
            self.load_forward, self.finalize_forward, self.coefficients, self.load_backward,
            self.finalize_backward, self.dx_coefficients,
        )  # fmt: skip
        return "-".join([*(f.cache_key for f in functions), str((self.cumulative, self.guarded))])


class Workspace(NamedTuple):
    """Memory that the programs of a launch share."""

    sample: Any
    sample_ptr: Any  # the sample's partial results
    semaphores_ptr: Any  # counters of the programs that are done: of each block, then of each sample
    stats_ptr: Any
    loaded: Any  # by the Normalizer's load_forward or load_backward


class Parameters(NamedTuple):
    """Pointers to a layer's tensors of one value a channel, and to its counter of batches, or None."""

    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    batches: Any


class Options(NamedTuple):
    """The numbers that a forward is given. batch_renorm.py explains all but the first two."""

    eps: Any
    momentum: Any
    r_max: Any
    d_max: Any
    warmup: Any
    r_steps: Any
    d_steps: Any


class GradientSums(NamedTuple):
    """Sums of dy and of dy * (x - mean): of channels, or of groups and then weighted by gamma."""

    dy: Any
    dy_xmu: Any


class Gradients(NamedTuple):
    """Pointers to the results of a backward, or None. count: the number of values in a group."""

    dx_coeffs: Any
    weight: Any
    bias: Any
    sums: Any  # [samples, 2, channels]: what each sample adds to dgamma and dbeta
    count: Any


@triton.jit
def is_last_program(semaphores_ptr, expected):
    """True in the last of `expected` programs to arrive; earlier programs' stores are then visible. Resets
    the counter to 0."""
    tl.debug_barrier()  # all threads' stores come before the atomic, which one thread does
    last = tl.atomic_add(semaphores_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(semaphores_ptr, 0)
    return last


@triton.jit
def reciprocal_std(variance, eps, ACC: tl.constexpr):
    return 1.0 / tl.sqrt_rn(variance + eps) if ACC == tl.float32 else 1.0 / tl.sqrt(variance + eps)


@triton.jit
def load_nothing(c, params, ACC: tl.constexpr):
    """For a finalize_forward that needs the moments alone. Triton 3.6 cannot return None from a function."""
    return c.mask
