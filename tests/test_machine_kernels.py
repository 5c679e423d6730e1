"""The kernels behind the probes of the GPU itself, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from benchmarks.machine import bandwidth, kernels
from tests.support.cooperative import cooperative
from tests.support.trace import trace

CPU = torch.device("cpu")
VALUES = [pytest.param(values, id=str(values)) for values in (512, 3000, 9 * 1024)]


@pytest.mark.parametrize("processors", [0, 132], ids=["largest tile", "smallest tile"])
@pytest.mark.parametrize("values", VALUES)
def test_copy_copies_once(values: int, processors: int) -> None:
    x, y = kernels.randoms(values, CPU), torch.zeros(values)
    with trace(x=x, y=y) as t:
        kernels.copy(x, y, processors)
    assert torch.equal(x, y)
    assert (t["x"].reads, t["x"].writes, t["y"].reads, t["y"].writes) == (1, 0, 0, 1)
    assert not t.out_of_bounds
    assert not t.hazards


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("processors", [0, 132], ids=["largest tile", "smallest tile"])
@pytest.mark.parametrize("values", VALUES)
def test_read_sums_each_tile(values: int, processors: int, reverse: bool) -> None:
    x = torch.randint(-9, 9, (values,)).float()  # sums are exact
    tiles = x.split(kernels.tile_of(values, processors))
    sums = torch.full((len(tiles),), float("nan"))
    with trace(x=x, sums=sums) as t:
        kernels.read(x, sums, processors, reverse)
    assert sums.tolist() == [float(tile.sum()) for tile in tiles]
    assert (t["x"].reads, t["x"].writes, t["sums"].writes) == (1, 0, 1)
    assert not t.out_of_bounds


@pytest.mark.parametrize("processors", [0, 132], ids=["largest tile", "smallest tile"])
@pytest.mark.parametrize("values", VALUES)
def test_write_writes_once(values: int, processors: int) -> None:
    y = torch.zeros(values)
    with trace(y=y) as t:
        kernels.write(y, processors)
    assert torch.equal(y, (torch.arange(values) * kernels.FACTOR).to(torch.int32).float())
    assert (t["y"].reads, t["y"].writes) == (0, 1)
    assert not t.out_of_bounds


@pytest.mark.parametrize(("reverse", "first_sum"), [(False, 512), (True, 512 - 3 + 3 * 512)])
def test_a_reverse_read_takes_the_first_tile_last(reverse: bool, first_sum: int) -> None:
    """The sums are stored over the first tile's own values, so that its sum tells which tiles came before."""
    x = torch.ones(4 * 512)
    kernels.read(x, x, 132, reverse)
    assert x[:4].tolist() == [first_sum, 512, 512, 512]


def test_tiles_grow_with_the_buffer() -> None:
    tiles = [kernels.tile_of(size // 4, 132) for size in sorted(bandwidth.SIZES)]
    assert tiles == sorted(tiles)
    assert (tiles[0], tiles[-1]) == (kernels.SMALLEST, max(kernels.TILES))
    assert max(kernels.TILES) * 132 * 8 * 4 < bandwidth.LARGE[-1]


def test_buffers_hold_random_numbers() -> None:
    x = kernels.randoms(4096, CPU)
    assert x.unique().numel() > 4000
    assert not (x == 0).any()


def meet(programs: int, barriers: int, patience: int) -> tuple[int, list[int]]:
    arrivals, missed = torch.zeros(1, dtype=torch.int32), torch.zeros(programs, dtype=torch.int32)
    kernels.barrier_kernel[(programs,)](arrivals, missed, programs, barriers, patience)
    return int(arrivals), missed.tolist()


@pytest.mark.parametrize("programs", [2, 5])
def test_programs_under_way_at_once_meet(programs: int) -> None:
    with cooperative(seed=programs):
        assert meet(programs, barriers=4, patience=10_000) == (4 * programs, [0] * programs)


def test_programs_one_after_another_wait_in_vain_but_end() -> None:
    """The first has company at no barrier; the second arrives at the first one when all have."""
    assert meet(2, barriers=3, patience=7) == (6, [3, 0])
    assert meet(1, barriers=3, patience=7) == (3, [0])


def test_missed_barriers_add_up() -> None:
    arrivals, missed = torch.zeros(1, dtype=torch.int32), torch.tensor([40, 50], dtype=torch.int32)
    kernels.barrier_kernel[(2,)](arrivals, missed, 2, 3, 7)
    assert missed.tolist() == [43, 50]
