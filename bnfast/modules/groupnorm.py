"""GroupNorm: torch.nn's, with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.groupnorm import group_norm
from ..kernels.epilogue import Activation, ActivationLike
from .drop_in import DropIn, OptionalBias, says_what_it_takes


class GroupNorm(DropIn, OptionalBias, nn.GroupNorm):
    """torch.nn.GroupNorm on bnfast's kernels. input: [N, C, *], contiguous, channels_last or
    channels_last_3d."""

    @says_what_it_takes
    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self._without_bias(unless=bias)
        self.activation = Activation.of(activation)

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, activation=activation, residual=residual
        )
