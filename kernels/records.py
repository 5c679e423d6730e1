"""The records that travel: what a call asks of the kernels, and what a plan tells them. Needs no Triton.

A Geometry has the sizes of a pass over x. A kernel takes them one by one, because Triton would specialize
the members of a tuple, and packs them again in its first line. A Tile has the constants that it is compiled
with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """The sizes that a plan starts from: x of n samples, c channels and s positions (1 for 2-D input)."""

    n: int
    c: int
    s: int
    itemsize: int  # bytes of an element
    channels_last: bool  # C is the fastest dimension, as it is in 2-D input
    aligned: bool = True  # every tensor starts on 16 bytes
    sms: int = 132  # the GPU's number of SMs; an H200 has 132

    @property
    def bytes(self) -> int:
        """T: the bytes of x."""
        return self.n * self.c * self.s * self.itemsize


class Geometry(NamedTuple):
    """x as geometry.py walks over it. What ends in _v counts vectors of Tile.vec elements."""

    rows: Any
    pitch_v: Any  # from one row to the next
    width_v: Any  # of a block
    inner: Any  # S, if lanes are positions of channels
    channels: Any
    tiles: Any  # of a block
    pieces: Any  # nchw: rows that the S positions of a channel are cut into
    total_v: Any  # all of x, if it need not end with a row; one sample, if groups lie within samples
    blocks: Any
    splits: Any  # programs that share the tiles of a block
    group_size: Any  # channels of a group
    groups: Any  # of all samples


@dataclass(frozen=True)
class Tile:
    """A tile of x is [unroll * rows, lanes]. The fields after channel_align are for reductions."""

    mode: str  # "nhwc", "nhwc_packed", "nchw" or "nchw_packed": see geometry.py
    vec: int  # elements of a load instruction
    unroll: int  # loads that a thread has in flight of each input
    rows: int  # that one load of all threads covers
    lanes: int
    channel_align: int = 1  # channels begin on multiples of so many lanes
    channels: int = 1  # that a block reduces, as a power of two
    channels_per_iter: int = 1  # that are reduced over their lanes at a time
    lanes_per_channel: int = 1  # of a block, as a power of two
    partials_per_iter: int = 1  # that the last program of a block merges at a time
    iters_in_flight: int = 1  # whose loads are waited for at once
    groups_per_iter: int = 1  # that the last program of a sample merges at a time
    members_per_iter: int = 1  # channels of each of these groups
    held: bool = False  # a block is one tile, which a program keeps in registers

    @property
    def tile_rows(self) -> int:
        return self.unroll * self.rows

    @property
    def partials_in_flight(self) -> int:
        """That the last program of a block waits for at once."""
        return self.partials_per_iter * self.iters_in_flight

    @property
    def one_channel(self) -> bool:
        """Whether a block is one channel, whose positions are lanes."""
        return self.mode != "nhwc" and self.lanes_per_channel == self.lanes

    @property
    def few_channels(self) -> bool:
        """Whether a block has so few channels that each lane's value is compared with all of them."""
        return self.mode == "nchw_packed" and self.channels == self.channels_per_iter == 2


class GroupGeometry(NamedTuple):
    """Contiguous groups of group_size channels of inner_v vectors each: see one_pass.py."""

    groups: Any  # of all samples
    group_size: Any
    inner_v: Any
    groups_per_sample: Any


@dataclass(frozen=True)
class OnePassTile:
    """A tile is groups * channels * span vectors."""

    vec: int  # elements of a vector
    groups: int  # of a program
    channels: int  # of each group, in a tile
    span: int  # vectors of a channel, in a tile
    pieces: int  # tiles that a channel is cut into
    tiles: int

    @property
    def rows(self) -> int:
        return self.groups * self.channels * self.span

    @property
    def power_of_sums(self) -> int:
        """2 to the power of this are two sums of each set of channels, and what is missing to a power."""
        return (2 * self.tiles // self.pieces - 1).bit_length()


class RowGeometry(NamedTuple):
    """Rows that are normalized each by itself. A kernel takes the sizes that it needs."""

    rows: Any
    width_v: Any
    groups: Any = 0  # of rows, of which a program takes one at a time
    programs: Any = 0  # that share the rows of a block
    blocks: Any = 0  # of columns
    splits: Any = 0  # programs that share a row


@dataclass(frozen=True)
class RowTile:
    """A tile is [unroll * rows, lanes] or, of a row that does not fit in registers, [unroll, lanes] of it."""

    vec: int  # elements of a load instruction
    rows: int
    lanes: int
    unroll: int = 1
    parts: int = 1  # tiles across the width
    even: bool = False  # the last part is as full as the others
    early: bool = False  # gamma and beta of a part are loaded before the part before it is stored
    partials_per_iter: int = 1  # shares of a row that are merged at a time
    partial_rows: int = 1  # of sums of columns, that a program leaves
    shares: int = 1  # of the sums of a row, that a program leaves


class ColumnGeometry(NamedTuple):
    """Partial sums of columns: see column_sums.py."""

    rows: Any
    columns: Any
    blocks: Any


@dataclass(frozen=True)
class Overlap:
    """What a kernel does where launches of one call may overlap (see launch.OVERLAPS): it may start before
    the launch ahead of it has ended, and then waits for it; it tells the next one when it may start."""

    waits: bool = False
    signals: bool = False


ALONE, FIRST, MIDDLE, LAST = Overlap(), Overlap(signals=True), Overlap(True, True), Overlap(waits=True)

# Makes a NamedTuple in half the time that calling its class takes: new(Wanted, (dx, weight, bias)).
new: Any = tuple.__new__

# The tensors that training updates in place: running_mean, running_var and num_batches_tracked, or None.
Buffers = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_BUFFERS: Buffers = (None, None, None)


class Renorm(NamedTuple):
    """Batch Renormalization's limits and their schedule in batches (see normalizers/batch_renorm.py).
    guarded: a channel whose batch statistics are not finite keeps its running statistics."""

    r_max: float
    d_max: float
    warmup: float = 0.0
    r_steps: float = 0.0
    d_steps: float = 0.0
    guarded: bool = True


class BatchNormOptions(NamedTuple):
    """momentum None: the cumulative average of all batches. renorm: Batch Renormalization, in training."""

    training: bool
    momentum: float | None
    eps: float
    renorm: Renorm | None = None


class GroupNormOptions(NamedTuple):
    """kind: which of group_norm.NORMALIZERS."""

    groups: int
    eps: float
    kind: str = "group_norm"


class LayerNormOptions(NamedTuple):
    """shape: the sizes of the last dimensions, which are normalized over."""

    shape: Sequence[int]
    eps: float


class Wanted(NamedTuple):
    """The gradients that a backward has to compute: whether x's, and the dtypes of the parameters', or
    None."""

    dx: bool
    weight: torch.dtype | None
    bias: torch.dtype | None


# what a forward returns: y, the statistics for a backward, relu's mask if there is one
Forward = tuple[Tensor, Tensor, Tensor | None]
# what a backward returns: dx, dweight, dbias and dresidual; None if not wanted, or, for the residual, if it
# is dy
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
