"""A BatchNorm's `affine`, which tells who reads it: functions that build a bare layer, and nobody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from tests.support.versions import TORCH


@pytest.fixture(autouse=True)
def _in_plain_torch(plain_torch_in_one_thread: None) -> None:
    torch._dynamo.reset()


class Reading(nn.Module):
    def __init__(self, kind: Any = bnfast.BatchNorm2d, **options: Any) -> None:
        super().__init__()
        self.bn = kind(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y * 2 if self.bn.affine else y


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, fullgraph=True, backend="eager")


def exported(model: nn.Module) -> Callable[[Tensor], Tensor]:
    module: Any = torch.export.export(model, (torch.randn(2, 3, 4, 4),), strict=True).module()
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [bnfast.BatchNorm2d, bnfast.BatchRenorm2d])
@pytest.mark.parametrize("capture", [compiled, exported])
def test_it_is_read_in_graphs(capture: Any, kind: Any, affine: bool) -> None:
    model, x = Reading(kind, affine=affine, activation="relu").eval(), torch.randn(2, 3, 4, 4)
    assert_close(capture(model)(x), model(x))


@pytest.mark.skipif(TORCH < (2, 14), reason="Dynamo reads the weight for it")
def test_graphs_are_made_again_when_it_changes() -> None:
    model, x = Reading().eval(), torch.randn(2, 3, 4, 4)
    captured = compiled(model)
    assert_close(captured(x), 2 * model.bn(x))
    model.bn.affine = False
    assert_close(captured(x), model.bn(x))
