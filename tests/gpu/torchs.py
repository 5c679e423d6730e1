"""What bnfast's layers are judged beside, under the same names: torch.nn's, and plain torch where torch.nn
has no such layer, or not with such parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from bnfast.reference.batchrenorm import batch_renorm
from tests.support.group_cases import by_torch

BatchNorm1d, BatchNorm2d, BatchNorm3d = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
InstanceNorm1d, InstanceNorm2d, InstanceNorm3d = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d


class GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return by_torch(input, self.num_groups, self.weight, self.bias, self.eps)


class _BatchRenorm(bnfast.BatchRenorm2d):
    """The formulas of the reference, in x's dtype and autograd's hands."""

    def forward(self, input: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if not self.training:
            return F.batch_norm(input, mean, variance, self.weight, self.bias, eps=self.eps)
        limits = (self.r_max, self.d_max, self.warmup_steps, self.r_max_steps, self.d_max_steps)
        return batch_renorm(
            input, mean, variance, self.weight, self.bias, self.momentum, self.eps, limits,
            self.skip_nonfinite, self.num_batches_tracked,
        )  # fmt: skip


BatchRenorm1d = BatchRenorm2d = BatchRenorm3d = _BatchRenorm
