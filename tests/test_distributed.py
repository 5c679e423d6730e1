"""Data parallelism over gloo, two processes on this machine: DistributedDataParallel trains a model with our
layers as it trains one with torch.nn's, and keeps the ranks' buffers together."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from bnfast.interpreted import prepared

pytestmark = pytest.mark.slow

RANKS = 2


def train(library: Any, rank: int) -> dict[str, Tensor]:
    """Two steps: parameters, buffers and the last gradients of this rank, which has its own batches, so that
    it matters whose gradients and whose statistics are used."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 1), library.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = nn.parallel.DistributedDataParallel(network, broadcast_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 2, 3, 3) + rank).square().mean().backward()
        optimizer.step()
    return {**network.state_dict(), **{f"{name}.grad": p.grad for name, p in network.named_parameters()}}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    where, limit = f"file://{folder}/meeting", datetime.timedelta(seconds=50)
    torch.distributed.init_process_group("gloo", where, limit, rank=rank, world_size=RANKS)
    try:
        with prepared():
            results = {"ours": train(bnfast, rank), "theirs": train(nn, rank)}
    finally:
        torch.distributed.destroy_process_group()
    torch.save(results, Path(folder, f"{rank}.pt"))


def test_trains_as_torch(tmp_path: Path) -> None:
    """Gradients are those of all ranks, and the second step starts from rank 0's buffers."""
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=RANKS)
    for rank in range(RANKS):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert results["theirs"]["1.num_batches_tracked"] == 2
        assert_close(results["ours"], results["theirs"], rtol=1e-5, atol=2e-5)
