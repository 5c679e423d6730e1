"""InstanceNorm1d, InstanceNorm2d, InstanceNorm3d: torch.nn's, with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..functional.instancenorm import instance_norm
from .drop_in import DropIn, OptionalBias


class _Kernels(DropIn, OptionalBias, nn.modules.instancenorm._InstanceNorm):
    """What the three share. Checks of the input, and the dimension that an unbatched one lacks, are
    inherited."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        self._without_bias(unless=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input: [N, C, *] or [C, *] -> the same shape, dtype and memory format. See
        bnfast.functional.instance_norm."""
        if isinstance(input, Proxy):
            return self._leaf(input)
        return super().forward(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,  # as torch: None updates nothing
            self.eps,
        )


class InstanceNorm1d(_Kernels, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d on bnfast's kernels. input: [N, C, L] or [C, L]."""


class InstanceNorm2d(_Kernels, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d on bnfast's kernels. input: [N, C, H, W] or [C, H, W], contiguous or
    channels_last."""


class InstanceNorm3d(_Kernels, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d on bnfast's kernels. input: [N, C, D, H, W] or [C, D, H, W], contiguous or
    channels_last_3d."""
