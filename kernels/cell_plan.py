"""The plan of one_read.py: which cells a program can hold, and as how many tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from .plan import INT32, WARP
from .records import CellGeometry, CellTile
from .views import VECTOR_BYTES, ceil_div, floor_power_of_two, power_of_two

# Tiles that a program holds of each input without spills, in 128 registers a thread [sass, both Tritons]:
# with 16 warps, 80 KB of x where a tile is one channel, 64 KB of x otherwise, 32 KB each of x and dy.
HELD = {1: 8, 2: 4}
HELD_WHOLE = {1: 10, 2: 4}


@dataclass(frozen=True)
class CellSweep:
    """One launch of a kernel that holds whole cells."""

    tile: CellTile
    geometry: CellGeometry
    warps: int
    inputs: int
    itemsize: int
    registers: int = 128

    @cached_property
    def programs(self) -> int:
        return ceil_div(self.geometry.cells, self.tile.groups)

    @cached_property
    def bytes_a_program(self) -> int:
        """Bytes a program has in flight: all that it holds."""
        g, t = self.geometry, self.tile
        elements: int = t.groups * g.group * g.inner_v * t.vec
        return self.inputs * elements * self.itemsize


@lru_cache(maxsize=4096)
def cell_sweep(
    samples: int, in_sample: int, group: int, inner: int, itemsize: int, aligned: bool, inputs: int
) -> CellSweep | None:
    """The plan for `samples` times `in_sample` cells of `group` channels of `inner` positions, contiguous, of
    which `inputs` tensors are held. None: a cell is too large, or would leave too much of its tiles empty."""
    vec = VECTOR_BYTES // itemsize if aligned else 1
    while inner % vec:
        vec //= 2
    cells, span = samples * in_sample, ceil_div(inner, vec)
    if cells * group * 2 >= INT32:
        return None
    narrow = max(4, vec * itemsize)  # bytes of registers that a narrower load takes
    for warps in (4, 8, 16):
        threads = warps * WARP
        padded = power_of_two(span)
        if padded >= threads:  # a channel is one tile or several
            groups, channels, width = 1, 1, threads
            pieces = ceil_div(span, threads)
            tiles = pieces * group
        else:
            width, pieces = padded, 1
            channels = min(power_of_two(group), threads // padded)
            tiles = ceil_div(group, channels)
            groups = 1
            if tiles == 1:
                groups = min(max(1, threads // (channels * padded)), power_of_two(cells))
        held = (HELD_WHOLE if channels == groups == 1 else HELD)[inputs]
        if narrow < VECTOR_BYTES:  # more addresses for the same bytes
            held = held * 3 // 4 * VECTOR_BYTES // narrow
        if tiles <= held:
            needed = max(1, groups * channels * width // WARP)
            tile = CellTile(vec, groups, channels, width, pieces, tiles)
            geometry = CellGeometry(cells, group, inner // vec, in_sample)
            return CellSweep(tile, geometry, min(warps, floor_power_of_two(needed)), inputs, itemsize)
    return None
