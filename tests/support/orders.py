"""The programs of interpreted launches in other orders than from the first to the last."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from unittest import mock

import numpy as np
from triton.runtime import interpreter


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of each launch one after another, in a random order: a kernel whose last program
    finalises must give the same bits under any."""
    builder, chance = interpreter.InterpreterBuilder, random.Random(seed)
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    order: dict[tuple[int, ...], tuple[int, ...]] = {}

    def permute(self, *grid):
        programs = list(np.ndindex(grid))
        order.clear()
        order.update(zip(programs, chance.sample(programs, len(programs)), strict=True))
        set_grid_dim(self, *grid)

    def begin(self, *program):
        set_grid_idx(self, *order[program])

    with (
        mock.patch.object(builder, "set_grid_dim", permute),
        mock.patch.object(builder, "set_grid_idx", begin),
    ):
        yield
