"""Loads and stores, as most kernels need them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# eviction policies; Triton 3.6 takes no plain strings as defaults
ONCE = tl.constexpr("evict_first")
ANY = tl.constexpr("")


class Channels(NamedTuple):
    """The channels, or groups, of which a program has a value each, and which of them exist."""

    offs: Any
    mask: Any


@triton.jit
def as_scalar(value, DTYPE: tl.constexpr):
    """A float argument in the accumulator's type. Arguments are fp64, since Inductor passes Python floats as
    fp64 and fp64 tensors need the precision."""
    return tl.full((1,), value, DTYPE)


@triton.jit
def read(ptrs, mask, POLICY: tl.constexpr = ONCE):
    """Values, 0 where mask is not set. POLICY: evict_first, because most are not read again soon."""
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit
def write(ptrs, value, mask, POLICY: tl.constexpr = ONCE):
    """Stores value in the pointers' type."""
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask, eviction_policy=POLICY)


@triton.jit
def load_or(ptr, offs, mask, default: tl.constexpr, ACC: tl.constexpr, POLICY: tl.constexpr = ANY):
    """Values of an optional tensor, in the type ACC; `default` if there is no tensor."""
    if ptr is None:
        value = tl.full(offs.shape, default, ACC)
    else:
        value = tl.load(ptr + offs, mask=mask, other=default, eviction_policy=POLICY)
        if value.dtype.primitive_bitwidth == 16:
            value = value.to(tl.float32)  # see store_as
        value = value.to(ACC)
    return value


@triton.jit
def store_as(ptrs, value, mask):
    """`write` of a few values of any type. fp64 is converted to 16 bits by way of fp32, since no instruction
    does it in one step."""
    if ptrs.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    write(ptrs, value, mask, "")


@triton.jit
def load_row(ptr, row: tl.constexpr, c, pitch):
    """One row of [rows, pitch], of channels c."""
    return tl.load(ptr + row * pitch + c.offs, mask=c.mask, other=0.0)


@triton.jit
def store_rows(ptr, c, pitch, first, second, third=None, fourth=None):
    """Stores values of channels c in two to four rows of [rows, pitch]."""
    tl.store(ptr + c.offs, first, mask=c.mask)
    tl.store(ptr + pitch + c.offs, second, mask=c.mask)
    if third is not None:
        tl.store(ptr + 2 * pitch + c.offs, third, mask=c.mask)
    if fourth is not None:
        tl.store(ptr + 3 * pitch + c.offs, fourth, mask=c.mask)


@triton.jit
def load_shared(ptrs, mask):
    """What other programs of this launch have stored. .cg: it must not come from L1."""
    return tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def await_launch_before(PDL: tl.constexpr):
    """Waits until all that the launch before has stored can be loaded, if this one did not wait to start.
    Before it, a kernel loads only what that launch does not store, and stores nothing: the memory that it
    stores to may have been freed by what that launch still reads."""
    if PDL.waits:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_launch_start(PDL: tl.constexpr):
    """Lets the programs of the next launch start, once all of this one have come here or ended. What they
    wait for is that this launch ends, so it may still store."""
    if PDL.signals:
        tl.extra.cuda.gdc_launch_dependents()
