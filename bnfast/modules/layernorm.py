"""LayerNorm: a subclass of torch.nn's layer with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.epilogue import Activation, ActivationLike
from ..ops.layer_norm import layer_norm
from .mixins import NormMixin, says_what_it_takes


class LayerNorm(NormMixin, nn.LayerNorm):
    """Layer normalization over the last dimensions: torch.nn's LayerNorm on bnfast's kernels.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each row, that is over the last dimensions, those of normalized_shape. They
    are computed in fp32, for fp64 input in fp64, in training as in eval. Rows of up to 64 KB (in 16 bits 56
    KB) are read once, longer ones twice.

    The layer is a subclass of torch.nn.LayerNorm with another forward, so that checkpoints load both ways.
    Under autocast it returns input's dtype, where torch's returns fp32 and takes twice the memory.

    Args:
        normalized_shape (int or sequence of int): The sizes of the last dimensions, which are normalized
            together.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        elementwise_affine (bool): Whether the layer has a weight and a bias of shape normalized_shape.
            Default: True.
        bias (bool): Whether an affine layer has a bias beside its weight. Default: True.
        device: The device of weight and bias. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.

    Shape:
        - input: (*, *normalized_shape), of fp16, bf16, fp32 or fp64, in any strides.
        - residual (optional, the second argument of a call): input's shape, dtype and device, in any strides.
        - output: input's shape and dtype, contiguous.

    Returns:
        A call ``layer(input, residual=None)`` returns activation(norm(input) + residual).

    Raises:
        TypeError: The constructor got an unknown argument, or the residual is not a tensor.
        ValueError: The activation is unknown, or the residual's shape, dtype or device differs from the
            input's.
        RuntimeError: The input's last dimensions are not normalized_shape, or sizes or devices do not match,
            as in torch.nn.

    Example:
        >>> norm = bnfast.LayerNorm(32, activation="gelu")
        >>> x, shortcut = torch.randn(8, 10, 32), torch.randn(8, 10, 32)
        >>> norm(x).shape  # gelu(norm(x))
        torch.Size([8, 10, 32])
        >>> y = norm(x, shortcut)  # gelu(norm(x) + shortcut)

    References:
        Ba, Kiros and Hinton 2016, "Layer Normalization", arXiv 1607.06450.
    """

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
