"""What a launch moves of each tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SECTOR = 32  # bytes; the unit in which a GPU's L2 moves data


@dataclass
class Traffic:
    """What one launch moved of a tensor; added up, what several did.

    size: the tensor's, in bytes. moved: bytes loaded and stored, sectors loaded and stored. A byte counts
    once for an instruction of a program, also where several lanes and warps move it, as they do if a tile has
    fewer values than the program has threads. It counts again for another instruction, another iteration and
    another program, and where programs that move it take turns, it may count again each turn. A sector counts
    once for what one line of the source moves in one iteration of a program, however many instructions that
    takes. touched: of each element, 1 if it was loaded, plus 2 if it was stored. storage: kept, so that no
    later tensor has the same address."""

    address: int
    size: int
    touched: np.ndarray = field(repr=False)
    moved: np.ndarray
    storage: Any = field(default=None, repr=False)

    loaded = property(lambda self: int(self.moved[0]))
    stored = property(lambda self: int(self.moved[1]))
    loaded_sectors = property(lambda self: int(self.moved[2]))
    stored_sectors = property(lambda self: int(self.moved[3]))
    # in multiples of the tensor's size
    reads = property(lambda self: self.loaded / self.size)
    writes = property(lambda self: self.stored / self.size)
    # bytes that were moved at least once
    unique_read = property(lambda self: self._unique(1))
    unique_written = property(lambda self: self._unique(2))
    # the useful share of the sectors that were moved; NaN if there were none
    read_efficiency = property(lambda self: _useful(self.loaded, self.loaded_sectors))
    write_efficiency = property(lambda self: _useful(self.stored, self.stored_sectors))

    def _unique(self, bit: int) -> int:
        return int(np.count_nonzero(self.touched & bit)) * (self.size // len(self.touched))

    def __add__(self, other: Traffic) -> Traffic:
        assert (self.address, self.size) == (other.address, other.size)
        touched, moved = self.touched | other.touched, self.moved + other.moved
        return Traffic(self.address, self.size, touched, moved, self.storage)


def _useful(moved: int, sectors: int) -> float:
    return moved / (SECTOR * sectors) if sectors else float("nan")
