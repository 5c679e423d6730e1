"""InstanceNorm1d, InstanceNorm2d, InstanceNorm3d: torch.nn's, with another forward."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.instancenorm import instance_norm
from ..kernels.epilogue import Activation, ActivationLike
from ..ops.arguments import check_residual
from .drop_in import DropIn, OptionalBias, says_what_it_takes


class _Kernels(DropIn, OptionalBias, nn.modules.instancenorm._InstanceNorm):
    """What the three share."""

    @says_what_it_takes
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
        activation: ActivationLike = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        self._without_bias(unless=bias)
        self.activation = Activation.of(activation)

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        self._check_input_dim(input)
        unbatched = self._get_no_batch_dim()
        dim = input.dim() - unbatched
        if input.size(dim) != self.num_features:  # as torch
            differs = f"input's size at dim={dim}"
            if self.affine:
                raise ValueError(
                    f"expected {differs} to match num_features ({self.num_features}), but got: "
                    f"{input.size(dim)}."
                )
            warnings.warn(
                f"{differs} does not match num_features. You can silence this warning by not passing in "
                "num_features, which is not used because affine=False",
                stacklevel=3,
            )
        if residual is not None:
            check_residual(input, residual)
        if input.dim() == unbatched:
            input, residual = input.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
        y = instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,  # as torch: None updates nothing
            self.eps,
            activation=activation,
            residual=residual,
        )
        return y if dim else y.squeeze(0)


class InstanceNorm1d(_Kernels, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d on bnfast's kernels. input: [N, C, L] or [C, L]."""


class InstanceNorm2d(_Kernels, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d on bnfast's kernels. input: [N, C, H, W] or [C, H, W], contiguous or
    channels_last."""


class InstanceNorm3d(_Kernels, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d on bnfast's kernels. input: [N, C, D, H, W] or [C, D, H, W], contiguous or
    channels_last_3d."""
