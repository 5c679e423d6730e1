"""LayerNorm: torch.nn's, with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.layernorm import layer_norm
from ..kernels.epilogue import Activation, ActivationLike
from .drop_in import DropIn, says_what_it_takes


class LayerNorm(DropIn, nn.LayerNorm):
    """torch.nn.LayerNorm on bnfast's kernels. input: [*, *normalized_shape]."""

    @says_what_it_takes
    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.activation = Activation.of(activation)

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, activation=activation,
            residual=residual,
        )  # fmt: skip
