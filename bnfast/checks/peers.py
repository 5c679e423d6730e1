"""Reference layers for comparison, under the names of bnfast's: torch.nn's, and plain torch where torch.nn
has no such layer or refuses such parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from bnfast import exact
from bnfast.kernels.records import Renorm
from bnfast.reference.batchrenorm import batch_renorm

BatchNorm1d, BatchNorm2d, BatchNorm3d = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
InstanceNorm1d, InstanceNorm2d, InstanceNorm3d = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d


def _alike(x: Tensor, *parameters: Tensor | None) -> bool:
    return all(t is None or t.dtype == x.dtype for t in parameters)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's own group_norm. It refuses parameters of another dtype than x on a GPU, and a bias without a
    weight on a CPU. With these, this function computes in fp32 (fp64 for fp64) throughout, and rounds the
    result."""
    if _alike(x, weight, bias) and (weight is not None or bias is None):
        return F.group_norm(x, groups, weight, bias, eps)
    wide = exact.accumulator(x.dtype)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    return F.group_norm(x.to(wide), groups, weight, bias, eps).to(x.dtype)


def layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """torch's own layer_norm; where dtypes differ, in fp32 (fp64 for fp64), with a result of x's dtype."""
    if _alike(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)
    wide = exact.accumulator(x.dtype)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), shape, weight, bias, eps).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class _BatchRenorm(bnfast.BatchRenorm2d):
    """The formulas of the reference in x's dtype, differentiated by autograd."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if not self.training or mean is None or variance is None:
            return F.batch_norm(input, mean, variance, self.weight, self.bias, eps=self.eps)
        limits = (self.r_max, self.d_max, self.warmup_steps, self.r_max_steps, self.d_max_steps)
        return batch_renorm(
            input, mean, variance, self.weight, self.bias, self.momentum, self.eps,
            Renorm(*limits, self.skip_nonfinite), self.num_batches_tracked,
        )  # fmt: skip


BatchRenorm1d = BatchRenorm2d = BatchRenorm3d = _BatchRenorm
