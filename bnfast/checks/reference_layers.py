"""Reference layers for comparison, under the names of bnfast's: torch.nn's, and plain torch where torch.nn
has no such layer or refuses such parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from bnfast import exact
from bnfast.kernels.records import Renorm
from bnfast.modules.batchrenorm import LIMITS
from bnfast.reference.batchrenorm import batch_renorm

BatchNorm1d, BatchNorm2d, BatchNorm3d = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
InstanceNorm1d, InstanceNorm2d, InstanceNorm3d = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d


class GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if weight is None and self.bias is not None:  # which torch refuses on a CPU
            weight = torch.ones_like(self.bias)
        return _in_one_type(F.group_norm, input, self.num_groups, weight, self.bias, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return _in_one_type(F.layer_norm, input, self.normalized_shape, self.weight, self.bias, self.eps)


def _in_one_type(
    norm: Any, x: Tensor, size: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """torch's own function. On a GPU it refuses parameters of another dtype than x. With these, this computes
    in fp32 (fp64 for fp64) throughout, and rounds the result."""
    if all(t is None or t.dtype == x.dtype for t in (weight, bias)):
        return norm(x, size, weight, bias, eps)
    wide = exact.accumulator(x.dtype)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return norm(x.to(wide), size, weight, bias, eps).to(x.dtype)


class _BatchRenorm(bnfast.BatchRenorm2d):
    """The formulas of the reference in x's dtype, differentiated by autograd."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if not self.training or mean is None or variance is None:
            return F.batch_norm(input, mean, variance, self.weight, self.bias, eps=self.eps)
        renorm = Renorm._make(getattr(self, name) for name in (*LIMITS, "skip_nonfinite"))
        return batch_renorm(
            input, mean, variance, self.weight, self.bias, self.momentum, self.eps, renorm,
            self.num_batches_tracked,
        )  # fmt: skip


BatchRenorm1d = BatchRenorm2d = BatchRenorm3d = _BatchRenorm
