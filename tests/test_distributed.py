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


def network(library: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 1), library.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    return nn.Sequential(*layers)


def batch(rank: int, step: int) -> Tensor:
    """Each rank's own, so that it matters whose gradients and whose statistics are used."""
    return torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(10 * rank + step)) + rank


def train(library: Any, rank: int) -> dict[str, Tensor]:
    """Two steps: parameters, buffers and the last gradients of this rank."""
    model = nn.parallel.DistributedDataParallel(network(library), broadcast_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
    gradients = {f"{name}.grad": p.grad for name, p in model.module.named_parameters()}
    return {**model.module.state_dict(), **gradients}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=50),
    )
    try:
        with prepared():
            results = {"ours": train(bnfast, rank), "theirs": train(nn, rank)}
    finally:
        torch.distributed.destroy_process_group()
    torch.save(results, Path(folder, f"{rank}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank was left with."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_trains_as_torch(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    for results in ranks:
        assert results["theirs"]["1.num_batches_tracked"] == 2
        assert_close(results["ours"], results["theirs"], rtol=1e-5, atol=2e-5)


def test_ranks_agree(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    """Gradients and parameters are everywhere the same. The second step starts from rank 0's buffers
    everywhere, to which each rank adds its own batch: 0.9 of something common, which lone ranks lack."""
    first, second = (results["ours"] for results in ranks)
    for name, value in first.items():
        if "running" not in name:
            assert_close(value, second[name], rtol=0, atol=0)
    inputs = [network(nn)[0](batch(rank, 0)).detach() for rank in range(RANKS)]
    means = [0.1 * x.mean((0, 2, 3)) for x in inputs]
    assert (means[0] - means[1]).abs().max() > 1e-2
    model = network(nn)
    model.load_state_dict({k: v for k, v in second.items() if not k.endswith(".grad")})
    # Undo rank 1's second batch. Its own convolution moved by one step of SGD only, hence the tolerance.
    last = 0.1 * model[0](batch(1, 1)).mean((0, 2, 3)).detach()
    started = (second["1.running_mean"] - last) / 0.9
    assert (started - means[0]).norm() < 0.2 * (started - means[1]).norm()
