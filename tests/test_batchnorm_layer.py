"""What BatchNorm alone has as a module: old checkpoints, averages of weights, and `affine`, which tells who
reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from tests.support.layers import BY_NAME, assert_same, data, every_path, step
from tests.support.versions import TORCH


def test_version_1_checkpoint_loads_strictly() -> None:
    """Checkpoints from before torch 0.4.1 know no num_batches_tracked."""
    layer = BY_NAME["BatchNorm2d"]
    ours, theirs = layer.pair()
    step(theirs, layer.input())
    new = theirs.state_dict()
    new.pop("num_batches_tracked")
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(new, strict=True)
    new._metadata[""]["version"] = 1
    ours.num_batches_tracked.fill_(3)
    ours.load_state_dict(new, strict=True)
    assert ours.num_batches_tracked == 3  # torch's rule: what the file lacks stays as it is
    assert_close(ours.running_mean, theirs.running_mean, rtol=0, atol=0)


@every_path
def test_update_bn(path: str) -> None:
    """Stochastic weight averaging recomputes the statistics, as a cumulative average over three batches."""
    pair = [nn.Sequential(layer) for layer in BY_NAME["BatchNorm2d"].pair()]
    batches = [data(n, 4, 5, 5, seed=n) for n in (2, 3, 4)]
    for model in pair:
        torch.optim.swa_utils.update_bn(batches, model)
    assert pair[0][0].momentum == 0.1
    assert_same(*(model.state_dict() for model in pair))


class Reading(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.bn = kind(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y * 2 if self.bn.affine else y


@pytest.mark.usefixtures("plain_torch_in_one_thread")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [bnfast.BatchNorm2d, bnfast.BatchRenorm2d])
@pytest.mark.parametrize("exported", [False, True], ids=["compiled", "exported"])
def test_it_is_read_in_graphs(exported: bool, kind: Any, affine: bool) -> None:
    torch._dynamo.reset()
    model, x = Reading(kind, affine=affine, activation="relu").eval(), data(2, 3, 4, 4)
    if exported:
        captured = torch.export.export(model, (x,), strict=True).module()
    else:
        captured = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(captured(x), model(x))


@pytest.mark.usefixtures("plain_torch_in_one_thread")
@pytest.mark.skipif(TORCH < (2, 14), reason="Dynamo reads the weight for it")
def test_graphs_are_made_again_when_it_changes() -> None:
    torch._dynamo.reset()
    model, x = Reading(bnfast.BatchNorm2d).eval(), data(2, 3, 4, 4)
    captured = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(captured(x), 2 * model.bn(x))
    model.bn.affine = False
    assert_close(captured(x), model.bn(x))
