"""LayerNorm: torch.nn's, with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..functional.layernorm import layer_norm
from .drop_in import DropIn


class LayerNorm(DropIn, nn.LayerNorm):
    """torch.nn.LayerNorm on bnfast's kernels. input: [*, *normalized_shape]."""

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input: [*, *normalized_shape] -> the same shape and dtype. See bnfast.functional.layer_norm."""
        if isinstance(input, Proxy):
            return self._leaf(input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
