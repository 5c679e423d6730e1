"""Do variants of a network train alike? Their losses over some steps, and how far those may lie apart.

Correct variants differ: each sums in an order of its own, and what is fused rounds once where torch.nn rounds
twice. Training magnifies it, by how much nobody can tell beforehand. So torch.nn is held against itself: its
batch in another order is the same problem, with the same loss and the same gradients but for rounding. The
largest difference that a few such orders make, times a factor since they are few, is what a variant may
differ by.

How sharp that is, seen on a CPU with ResNet-50 of width 8 in bf16 (five runs, of 16 images of 64 x 64 and
eight orders each, with learning rates of 0.01 and 0.1): an order was beyond twice the largest of three others
in 0.1 % of all choices, and never beyond three times; norm, add and ReLU rounded once were 0.6 to 1.6 times
the largest of three; a gradient of BatchNorm's weights that is 20 % too large was 6 to 20 times that. Smaller
faults are for the tests of the layers: this shows that nothing is wired wrongly. In fp32 orders lie further
apart among themselves, as one ReLU more or less on the other side of 0 is all there is to see; in fp64 there
is none, and the limit is sharp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.model_training import Run, Step

STEPS = 20
ORDERS = 3
FACTOR = 3.0


def curve(step: Step, run: Run, steps: int) -> Tensor:
    """The losses of the first steps, [steps], in their dtype, on the CPU. run: the step, or a graph of it."""
    step.reset()
    return torch.stack([run().clone() for _ in range(steps)]).cpu()


def apart(losses: Tensor, reference: Tensor) -> float:
    """The largest relative difference; NaN if there is any."""
    theirs = reference.double()
    return float(((losses.double() - theirs) / theirs).abs().max())


def allowed(step: Step, x: Tensor, labels: Tensor, reference: Tensor, orders: int) -> float:
    """What `apart` may be. step: trains torch.nn's network on x and labels, and had the losses `reference`.
    Both tensors are reordered in place, and put back."""
    given = x.clone(), labels.clone()
    generator = torch.Generator().manual_seed(0)
    seen: list[float] = []
    try:
        for _ in range(orders):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            x.copy_(given[0][order])
            labels.copy_(given[1][order])
            seen.append(apart(curve(step, step, len(reference)), reference))
    finally:
        x.copy_(given[0])
        labels.copy_(given[1])
    return FACTOR * largest([*seen, torch.finfo(reference.dtype).eps])


def largest(values: Sequence[float]) -> float:
    """NaN if there is any, which `max` may pass over."""
    return float(torch.tensor(values, dtype=torch.float64).max())
