"""How far two training runs lie apart, and how far they may.

Two correct implementations round differently, and training magnifies it: once a ReLU's input falls to
different sides of zero, the curves part. In fp32 that happens within a hundred steps of the digits, so
only the beginning can be held to a close limit there; in fp64 nothing of it is seen, and the whole run is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.digits import Run

BEGINNING = 8  # steps


@dataclass(frozen=True)
class Limits:
    """The largest differences allowed; None where it says nothing."""

    beginning: float
    losses: float
    gradients: float
    parameters: float | None
    buffers: float | None
    accuracy: float | None


# The digits, trained in full. fp32: the later limits only catch a curve that goes another way altogether.
FULL = {
    torch.float32: Limits(1e-4, 0.5, 1e-4, None, None, 0.03),
    torch.float64: Limits(1e-11, 1e-8, 1e-10, 1e-7, 1e-7, 0.003),
}
# A few steps on small batches, in fp32: too short for rounding to grow.
FEW_STEPS = Limits(1e-5, 1e-5, 1e-4, 1e-4, 1e-4, None)


@dataclass(frozen=True)
class Agreement:
    """The differences between two runs; those of the first step's gradients are relative, in norm. buffers:
    None where the networks have none."""

    beginning: float
    losses: float
    gradients: float
    parameters: float
    buffers: float | None
    accuracy: float

    def beyond(self, limits: Limits) -> list[str]:
        """What is not within its limit. Written so that a NaN is not within any."""
        found = []
        for name in Limits.__dataclass_fields__:
            value, limit = getattr(self, name), getattr(limits, name)
            if limit is not None and value is not None and not value <= limit:
                found.append(f"{name} differ by {value:.1e}, more than {limit:.0e}")
        return found


def pairs(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    if {name: value.shape for name, value in first.items()} != {name: v.shape for name, v in second.items()}:
        raise ValueError("the two networks do not have the same parameters and buffers")
    return [(value.double(), second[name].double()) for name, value in first.items()]


def largest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of any element."""
    apart = [(ours - theirs).abs().max() for ours, theirs in pairs(first, second)]
    return float(torch.stack(apart).max())  # a NaN stays one, which Python's max() would lose


def relative(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The worst tensor's distance in norm, relative to its norm in `first`."""
    apart = [(ours - theirs).norm() / ours.norm() for ours, theirs in pairs(first, second)]
    return float(torch.stack(apart).max())


def compare(first: Run, second: Run) -> Agreement:
    losses = torch.tensor([first.losses, second.losses], dtype=torch.float64)
    apart = (losses[0] - losses[1]).abs()
    return Agreement(
        beginning=float(apart[:BEGINNING].max()),
        losses=float(apart.max()),
        gradients=relative(first.gradients, second.gradients),
        parameters=largest(first.parameters, second.parameters),
        buffers=largest(first.buffers, second.buffers) if first.buffers or second.buffers else None,
        accuracy=abs(first.accuracy - second.accuracy),
    )
