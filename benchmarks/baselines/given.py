"""Parameters and running statistics of a case: the same numbers for everybody, in tensors of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.cases import Case

EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class Given:
    """All [C]; weight and bias need gradients. Running statistics only for BatchNorm, None for the others."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]


def given(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> Given:
    """dtype: of the parameters, if not the case's own."""
    generator = torch.Generator().manual_seed(7)
    channels = case.shape[1]

    def random(low: float, high: float, kind: torch.dtype) -> Tensor:
        return torch.empty(channels).uniform_(low, high, generator=generator).to(device, kind)

    kind = case.parameter_dtype if dtype is None else dtype
    weight, bias = random(0.5, 1.5, kind).requires_grad_(), random(-0.5, 0.5, kind).requires_grad_()
    mean, variance = random(-0.5, 0.5, torch.float32), random(0.5, 1.5, torch.float32)
    running = case.norm == "BatchNorm"
    return Given(weight, bias, mean if running else None, variance if running else None)
