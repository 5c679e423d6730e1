"""BatchNorm1d, BatchNorm2d, BatchNorm3d: torch.nn's, with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions, new
from ..ops.batch_norm import batch_norm
from ..ops.op import Call
from .drop_in import OptionalBias, says_what_it_takes
from .replaceable import Replaceable


class _Kernels(Replaceable, OptionalBias, nn.modules.batchnorm._BatchNorm):
    """What the three share. Everything but the forward is inherited: state_dict, buffers, repr, dimension
    checks.
    """

    @says_what_it_takes
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._without_bias(unless=bias)
        self.activation = Activation.of(activation)

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        self._check_input_dim(input)
        tracked = self.training and self.track_running_stats
        mean, variance, batches, momentum = None, None, None, self.momentum
        if tracked or not self.training:
            mean, variance = self.running_mean, self.running_var
        if tracked:
            batches = self.num_batches_tracked
        if momentum is None and batches is None:
            momentum = 0.0
        training = self.training or (self.running_mean is None and self.running_var is None)
        options, buffers = (
            new(BatchNormOptions, (training, momentum, self.eps, None)),
            (mean, variance, batches),
        )
        call = (input, self.weight, self.bias, residual, activation, options, buffers)
        return batch_norm(new(Call, call))


class BatchNorm1d(_Kernels, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on bnfast's kernels. input: [N, C] or [N, C, L]."""


class BatchNorm2d(_Kernels, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on bnfast's kernels. input: [N, C, H, W], contiguous or channels_last."""


class BatchNorm3d(_Kernels, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on bnfast's kernels. input: [N, C, D, H, W], contiguous or channels_last_3d."""
