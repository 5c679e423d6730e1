"""What the tests of bnfast.fuse share: a batch, a model with and without fusing, and a count."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import bnfast
from tests.support.block_forms import CHANNELS


def data(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, CHANNELS, 4, 4, dtype=torch.float64, generator=generator)


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model fused, and the same as it was."""
    torch.manual_seed(0)
    theirs = make().double()
    return bnfast.fuse(copy.deepcopy(theirs)), theirs


def fused_count(model: nn.Module) -> int:
    return len(bnfast.fusion_report(model).fused)
