"""The layers that the digits can be trained with, in pairs: torch.nn's and bnfast's, and what the kernels of
the latter are expected to launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bnfast
from benchmarks import LAYERS
from benchmarks.digits import Norm

GROUPS = 4


class Launches(NamedTuple):
    """Kernels that one layer launches in a training step, forward and backward, and in eval."""

    forward: int
    backward: int
    inference: int


@dataclass(frozen=True)
class Pair:
    """Two layers that should do the same, each made for a number of channels. library: whose `theirs` is.
    launches: of our layer, for an fp32 input of a shape. about: what else is to be said of the two."""

    theirs: Norm
    ours: Norm
    their_name: str
    our_name: str
    launches: Callable[[Sequence[int]], Launches]
    library: str = "torch.nn"
    about: str = ""


@dataclass(frozen=True)
class Schedule:
    """Batch Renormalization's arguments, as bnfast.BatchRenorm2d has them; the paper's are for far longer
    runs. After the warm-up r reaches from 0.7 to 1.3 here and d up to 0.4, so these limits cut some off."""

    warmup_steps: int
    r_max_steps: int
    d_max_steps: int
    r_max: float = 1.1
    d_max: float = 0.2
    momentum: float = 0.1


def schedule(steps: int) -> Schedule:
    """For a run of so many steps: BatchNorm for a quarter of it, and the limits in full after three."""
    return Schedule(steps // 4, steps * 3 // 4, steps // 2)


class PlainBatchRenorm2d(nn.BatchNorm2d):
    """Batch Renormalization in plain torch operators, as Ioffe 2017 (arXiv 1702.03275) has it in algorithm 1,
    with nothing of bnfast in it: torch.nn has none to compare with. Eval is BatchNorm's."""

    def __init__(self, channels: int, limits: Schedule) -> None:
        super().__init__(channels, momentum=limits.momentum)
        self.limits = limits

    def _limit(self, start: float, end: float, last: int) -> float:
        """Of the batch at hand: `start` until the warm-up is over, `end` from batch `last` on."""
        batch, first = int(self.num_batches_tracked or 0), self.limits.warmup_steps
        share = 1.0 if batch >= last else max(0.0, (batch - first) / (last - first))
        return start + share * (end - start)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W] -> the same shape."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        row = (1, -1, 1, 1)
        mean = x.mean((0, 2, 3), keepdim=True)
        sigma = ((x - mean).square().mean((0, 2, 3), keepdim=True) + self.eps).sqrt()
        with torch.no_grad():
            usual_mean, usual_sigma = (
                self.running_mean.view(row),
                (self.running_var + self.eps).sqrt().view(row),
            )
            r_max = self._limit(1.0, self.limits.r_max, self.limits.r_max_steps)
            d_max = self._limit(0.0, self.limits.d_max, self.limits.d_max_steps)
            r = (sigma / usual_sigma).clamp(1 / r_max, r_max)
            d = ((mean - usual_mean) / usual_sigma).clamp(-d_max, d_max)
            new_sigma = usual_sigma.lerp(sigma, self.limits.momentum)
            self.running_mean.lerp_(mean.flatten(), self.limits.momentum)
            self.running_var.copy_(new_sigma.flatten().square() - self.eps)
            self.num_batches_tracked += 1
        return ((x - mean) / sigma * r + d) * self.weight.view(row) + self.bias.view(row)


class OverChannels(nn.Module):
    """A LayerNorm over the channels of each position of [N, C, H, W], as ConvNeXt has it (Liu et al. 2022,
    arXiv 2201.03545). Its result is contiguous: torch 2.13's convolutions of few channels were seen to write
    past their memory on a CPU where it was channels_last."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def _batch(shape: Sequence[int]) -> Launches:
    from bnfast.kernels import plan

    planned = plan.batch_norm(shape[0], shape[1], prod(shape[2:]), 4, False)
    return Launches(planned.forward_launches, planned.backward_launches, 1)


def _groups(groups: int | None, shape: Sequence[int]) -> Launches:
    """groups: None for one a channel."""
    from bnfast.kernels import group_plan

    sizes = (shape[0], shape[1], prod(shape[2:]), groups or shape[1])
    planned = group_plan.group_norm(*sizes, 4, False)
    return Launches(planned.forward_launches, planned.backward_launches, planned.forward_launches)


def _rows(shape: Sequence[int]) -> Launches:
    from bnfast.kernels import row_plan

    size = row_plan.Rows(shape[0] * prod(shape[2:]), shape[1], 4, True, 132)
    forward, backward = row_plan.launches(size)
    return Launches(forward, backward, forward)


def pair(name: str, steps: int) -> Pair:
    """The layers of one of LAYERS, for a run of so many steps."""
    names = (f"torch.nn.{name}2d", f"bnfast.{name}2d")
    if name == "BatchNorm":
        return Pair(nn.BatchNorm2d, bnfast.BatchNorm2d, *names, _batch)
    if name == "BatchRenorm":
        limits = schedule(steps)
        return Pair(
            partial(PlainBatchRenorm2d, limits=limits),
            partial(bnfast.BatchRenorm2d, **vars(limits)),
            "algorithm 1 in plain torch", names[1], _batch, "plain torch",
            "torch.nn has no Batch Renormalization: the other side is algorithm 1 of the paper (Ioffe 2017) "
            f"in plain torch operators. r is 1 and d is 0 for {limits.warmup_steps} steps; their limits "
            f"reach {limits.r_max} at step {limits.r_max_steps} and {limits.d_max} at {limits.d_max_steps}.",
        )  # fmt: skip
    if name == "GroupNorm":
        return Pair(
            partial(nn.GroupNorm, GROUPS), partial(bnfast.GroupNorm, GROUPS),
            f"torch.nn.GroupNorm of {GROUPS} groups", f"bnfast.GroupNorm of {GROUPS} groups",
            partial(_groups, GROUPS),
        )  # fmt: skip
    if name == "InstanceNorm":
        return Pair(
            partial(nn.InstanceNorm2d, affine=True), partial(bnfast.InstanceNorm2d, affine=True),
            f"{names[0]} with affine=True", f"{names[1]} with affine=True", partial(_groups, None),
        )  # fmt: skip
    if name == "LayerNorm":
        return Pair(
            lambda channels: OverChannels(nn.LayerNorm(channels)),
            lambda channels: OverChannels(bnfast.LayerNorm(channels)),
            "torch.nn.LayerNorm", "bnfast.LayerNorm", _rows,
            about="Both normalize the channels of each position, with a permutation before and after.",
        )  # fmt: skip
    raise ValueError(f"there is no layer {name!r} to train with; there are {', '.join(LAYERS)}")
