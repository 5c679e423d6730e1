"""The records that travel: what a call asks of the kernels, and what a plan hands to them. Needs no Triton.

A Geometry has the sizes of a walk over x: a kernel is launched with them one by one, for Triton specializes
the members of a tuple, and packs them again in its first line. A Tile is what it is compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """What a plan starts from: x of n samples, c channels and s positions (1 for 2-D input)."""

    n: int
    c: int
    s: int
    itemsize: int  # bytes an element
    channels_last: bool  # C is the fastest dimension; 2-D input counts as that
    aligned: bool = True  # every tensor starts on 16 bytes
    sms: int = 132  # of the GPU; an H200's


class Geometry(NamedTuple):
    """x as geometry.py walks over it. Units of `_v`: vectors of Tile.vec elements."""

    rows: Any
    pitch_v: Any  # from one row to the next
    width_v: Any  # of a block
    inner: Any  # S, where lanes are positions of channels
    channels: Any
    tiles: Any  # of a block
    pieces: Any  # "runs": rows that the S positions of a channel are cut into
    total_v: Any  # all of x where its end is no multiple of a row; a sample where cells lie within one
    blocks: Any
    splits: Any  # programs that share the tiles of a block
    group: Any  # channels a cell
    cells: Any  # in all


@dataclass(frozen=True)
class Tile:
    """A tile of x is [unroll * rows, lanes]. What follows `step` is for reductions."""

    mode: str  # "rows", "cycles", "planes" or "runs": see geometry.py
    vec: int  # elements a load instruction
    unroll: int  # loads that a thread has under way of each input
    rows: int  # that share one of them
    lanes: int
    step: int = 1  # channels begin on multiples of so many lanes
    channels: int = 1  # that a block is answerable for, as a power of two
    fold: int = 1  # channels that are summed over their lanes at a time
    positions: int = 1  # lanes of a block that hold the same channel, as a power of two
    merge: int = 1  # splits that the last program merges at a time
    groups: int = 1  # groups of channels that the last program of a sample merges at a time
    members: int = 1  # channels of each group that it merges at a time

    @property
    def tile_rows(self) -> int:
        return self.unroll * self.rows


class CellGeometry(NamedTuple):
    """Contiguous cells, of `group` channels of inner_v vectors each: see one_read.py."""

    cells: Any  # in all
    group: Any
    inner_v: Any
    in_sample: Any  # cells a sample


@dataclass(frozen=True)
class CellTile:
    """A tile is groups * channels * span vectors."""

    vec: int  # elements a vector
    groups: int  # cells a program
    channels: int  # of each cell, in a tile
    span: int  # vectors of a channel, in a tile
    pieces: int  # tiles that a channel is cut into
    tiles: int

    @property
    def rows(self) -> int:
        return self.groups * self.channels * self.span


class RowGeometry(NamedTuple):
    """Rows that are normalized each by itself. A kernel takes those of these sizes that it needs."""

    rows: Any
    width_v: Any
    groups: Any = 0  # of rows that a program takes at a time
    programs: Any = 0  # that share the rows of a block
    blocks: Any = 0  # of columns
    splits: Any = 0  # programs that share a row


@dataclass(frozen=True)
class RowTile:
    """A tile is [unroll * rows, lanes] or, of one row that is too long to be held, [unroll, lanes] of its
    elements."""

    vec: int  # elements a load instruction
    rows: int
    lanes: int
    unroll: int = 1
    parts: int = 1  # tiles across the width
    whole: bool = False  # the last of them is as full as the others
    merge: int = 1  # shares of a row that are merged at a time


class ColumnGeometry(NamedTuple):
    """Partial sums of columns: see column_sums.py."""

    rows: Any
    columns: Any
    blocks: Any


# A NamedTuple in half the time that calling its class takes: new(Wanted, (dx, weight, bias)).
new: Any = tuple.__new__

# What training updates in place: running_mean, running_var and num_batches_tracked, or None.
Buffers = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_BUFFERS: Buffers = (None, None, None)


class Renorm(NamedTuple):
    """Batch Renormalization's limits and their schedule in batches (see renorm.py). guarded: a channel that
    is not finite leaves its running statistics alone."""

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
    groups: int
    eps: float


class LayerNormOptions(NamedTuple):
    """shape: of the last dimensions, which are normalized over."""

    shape: Sequence[int]
    eps: float


class Wanted(NamedTuple):
    """Which gradients a backward is to compute: x's or not, and the parameters' by dtype (None: not)."""

    dx: bool
    weight: torch.dtype | None
    bias: torch.dtype | None


# what a forward returns: y, what it saves of the statistics, relu's mask if there is one
Forward = tuple[Tensor, Tensor, Tensor | None]
# of x, gamma, beta and the residual; None for what is not wanted, and for the residual where it is dy
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
