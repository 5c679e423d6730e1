"""What the executor finds in small kernels that Triton has compiled: races, bad accesses, and how much they
move."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnfast.ptx.execute import Fault
from tests.support import toys
from tests.support.toy_launches import Executed

pytestmark = [pytest.mark.static, pytest.mark.usefixtures("executor")]

copy = Executed(toys.copy)


def counter() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32)


def test_a_copy_reads_and_writes_once() -> None:
    storage = torch.randn(2, 208, dtype=torch.float16)  # 13 sectors each
    x, y = storage[0, :200], torch.empty(200, dtype=torch.float16)
    t = copy[(4,)](x, y, 200, BLOCK=64).tensors
    assert torch.equal(x, y)
    assert (t["x"].reads, t["x"].writes, t["y"].reads, t["y"].writes) == (1, 0, 0, 1)
    assert t["x"].unique_read == t["y"].unique_written == t["x"].size == 400
    assert t["x"].read_efficiency == t["y"].write_efficiency == 400 / 416


@pytest.mark.parametrize(
    ("x", "options", "read", "efficiency", "written"),
    [
        (torch.randn(128), {"FAULT": "half"}, 4 * 128, 1, 0.5),
        (torch.randn(512), {"STRIDE": 4}, 4 * 128, 0.25, 1),
        (torch.ones(1), {"STRIDE": 0}, 4, 0.125, 1),
    ],
    ids=["half is written", "stride", "one value"],
)
def test_other_copies(
    x: torch.Tensor, options: dict[str, Any], read: int, efficiency: float, written: float
) -> None:
    y = torch.empty(128)
    t = copy[(2,)](x, y, 128, BLOCK=64, **options).tensors
    assert (t["x"].unique_read, t["x"].read_efficiency) == (read, efficiency)
    assert (t["y"].writes, t["y"].unique_written, t["y"].write_efficiency) == (written, written * 512, 1)


def test_launches_add_up() -> None:
    x, y = torch.randn(128), torch.empty(128)
    first, second = (copy[(128 // block,)](x, y, 128, BLOCK=block).tensors for block in (64, 32))
    assert [(first[name] + second[name]).moved[:2].tolist() for name in "xy"] == [[1024, 0], [0, 1024]]
    assert (first["x"] + second["x"]).unique_read == (first["y"] + second["y"]).unique_written == 512


def test_overlapping_tensors_are_refused() -> None:
    x = torch.zeros(128)
    with pytest.raises(ValueError, match="y overlaps"):
        copy[(1,)](x[:65], x[64:], 64, BLOCK=64)


def test_an_overrun() -> None:
    with pytest.raises(Fault, match="out of bounds"):
        copy[(2,)](torch.randn(100), torch.randn(100), 100, BLOCK=64, FAULT="overrun")


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("order", ["acq_rel", "relaxed", "release", "acquire"])
def test_a_merge_by_the_last_program(order: str, seed: int) -> None:
    """It is clean, and races if its atomic does not synchronize. The barrier before it is taken away in
    test_ptx_static.py, since Triton 3.9 adds one of its own."""
    x, y, partials = torch.randn(16, 1024), torch.empty(1024), torch.empty(4, 1024)
    options = {"BLOCK": 1024, "BARRIER": True, "SEM": order}
    merge = Executed(toys.sum_last_done, [seed])
    if order != "acq_rel":
        with pytest.raises(Fault, match="race in global memory"):
            merge[(4,)](x, partials, counter(), y, 4, **options)
        return
    t = merge[(4,)](x, partials, counter(), y, 4, **options).tensors
    assert torch.allclose(y, x.sum(0), atol=1e-5)
    assert (t["x"].reads, t["partials"].reads, t["partials"].writes, t["y"].writes) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("programs", "lanes", "found"),
    [(3, 1, "write-write race"), (1, 2, "with another warp|different values")],
    ids=["programs", "lanes"],
)
def test_two_stores_to_the_same_bytes(programs: int, lanes: int, found: str) -> None:
    y = torch.empty(64, dtype=torch.int32)
    with pytest.raises(Fault, match=found):
        Executed(toys.store_colliding)[(programs,)](y, BLOCK=64, LANES=lanes)


@pytest.mark.parametrize("seed", range(1, 5))
def test_a_store_to_what_others_read_races_in_any_order(seed: int) -> None:
    with pytest.raises(Fault, match="race in global memory|several programs load"):
        Executed(toys.advance_step, [seed])[(4,)](counter(), torch.empty(4, dtype=torch.int32))


def test_results_that_depend_on_the_order() -> None:
    with pytest.raises(Fault, match="gives other bits"):
        Executed(toys.number_arrivals)[(16,)](counter(), torch.empty(16, dtype=torch.int32))
