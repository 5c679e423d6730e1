"""GroupNorm: a subclass of torch.nn's layer with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.epilogue import Activation, ActivationLike
from ..ops.group_norm import group_norm
from .mixins import BiasMixin, NormMixin, says_what_it_takes


class GroupNorm(NormMixin, BiasMixin, nn.GroupNorm):
    """Group normalization of (N, C, *) input: torch.nn's GroupNorm on bnfast's kernels.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each group of a sample: C / num_groups neighbouring channels, at all
    positions. They are computed in fp32, for fp64 input in fp64, in training as in eval. Contiguous groups
    that a program can hold are read once; others, and channels_last, twice.

    The layer is a subclass of torch.nn.GroupNorm with another forward, so that checkpoints load both ways.
    Under autocast it returns input's dtype, where torch's returns fp32 on GPUs and takes twice the memory. On
    the kernels, a constant group gives 0 with eps=0 too, where torch's gives NaN.

    Args:
        num_groups (int): The number of groups, a divisor of num_channels.
        num_channels (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: True.
        device: The device of weight and bias. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.

    Shape:
        - input: (N, C, *), of fp16, bf16, fp32 or fp64, in any strides.
        - residual (optional, the second argument of a call): input's shape, dtype and device, in any strides.
        - output: input's shape and dtype, channels_last (or _3d) if input is, and contiguous otherwise.

    Returns:
        A call ``layer(input, residual=None)`` returns activation(norm(input) + residual).

    Raises:
        TypeError: The constructor got an unknown argument, or the residual is not a tensor.
        ValueError: num_groups does not divide num_channels, the activation is unknown, the whole batch has a
            single value for each group, or the residual's shape, dtype or device differs from the input's.
        RuntimeError: Sizes or devices do not match, as in torch.nn.

    Example:
        >>> norm = bnfast.GroupNorm(4, 16, activation="silu")
        >>> x, shortcut = torch.randn(8, 16, 4, 4), torch.randn(8, 16, 4, 4)
        >>> norm(x).shape  # silu(norm(x))
        torch.Size([8, 16, 4, 4])
        >>> y = norm(x, shortcut)  # silu(norm(x) + shortcut)

    References:
        Wu and He 2018, "Group Normalization", arXiv 1803.08494.
    """

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
