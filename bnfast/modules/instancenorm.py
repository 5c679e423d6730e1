"""InstanceNorm1d, InstanceNorm2d, InstanceNorm3d: torch.nn's layers with another forward."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.epilogue import Activation, ActivationLike
from ..ops.arguments import check_residual
from ..ops.instance_norm import instance_norm
from .mixins import BiasMixin, NormMixin, says_what_it_takes


class _Kernels(NormMixin, BiasMixin, nn.modules.instancenorm._InstanceNorm):
    """The constructor and forward of all three."""

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
        if input.size(dim) != self.num_features:  # torch's checks and messages
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
        training = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum  # as in torch, None updates nothing
        y = instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training, momentum, self.eps,
            activation=activation, residual=residual,
        )  # fmt: skip
        return y if dim else y.squeeze(0)


class InstanceNorm2d(_Kernels, nn.InstanceNorm2d):
    """Instance normalization of (N, C, H, W) or (C, H, W) input on bnfast's kernels.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each channel of a sample. With track_running_stats, training updates
    running statistics with the samples' average of the statistic and the unbiased variance, which reads x
    once more, and eval normalizes with them; without, training and eval are the same. Statistics are computed
    in fp32, for fp64 input in fp64, by GroupNorm's kernels.

    The layer is a subclass of torch.nn.InstanceNorm2d with another forward, so that checkpoints load both
    ways.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        momentum (float or None): The weight of a batch in the running statistics: new = (1 - momentum) * old
            + momentum * statistic of the batch. None updates nothing, as in torch.nn. Default: 0.1.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: False.
        track_running_stats (bool): Whether the layer keeps running statistics, and uses them in eval.
            Default: False.
        device: The device of parameters and buffers. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.

    Shape:
        - input: (N, C, H, W) or (C, H, W), of fp16, bf16, fp32 or fp64, in any strides.
        - residual (optional, the second argument of a call): input's shape, dtype and device, in any strides.
        - output: input's shape and dtype. It is channels_last if input is, and contiguous otherwise.

    Returns:
        A call ``layer(input, residual=None)`` returns activation(norm(input) + residual).

    Raises:
        TypeError: The constructor got an unknown argument, or the residual is not a tensor.
        ValueError: The activation is unknown, the input has another number of dimensions or, if affine, of
            channels, a channel of a sample has a single value, or the residual's shape, dtype or device
            differs from the input's.
        RuntimeError: Sizes or devices do not match, as in torch.nn.

    Input with another number of channels than num_features, if not affine, gives a warning, as in torch.nn.

    Example:
        >>> norm = bnfast.InstanceNorm2d(16, affine=True, activation="leaky_relu")
        >>> x, shortcut = torch.randn(8, 16, 4, 4), torch.randn(8, 16, 4, 4)
        >>> norm(x).shape  # leaky_relu(norm(x))
        torch.Size([8, 16, 4, 4])
        >>> y = norm(x, shortcut)  # leaky_relu(norm(x) + shortcut)

    References:
        Ulyanov, Vedaldi and Lempitsky 2016, "Instance Normalization: The Missing Ingredient for Fast
        Stylization", arXiv 1607.08022.
    """


class InstanceNorm1d(_Kernels, nn.InstanceNorm1d):
    """Instance normalization of (N, C, L) or (C, L) input on bnfast's kernels.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each channel of a sample. With track_running_stats, training updates
    running statistics with the samples' average of the statistic and the unbiased variance, which reads x
    once more, and eval normalizes with them; without, training and eval are the same. Statistics are computed
    in fp32, for fp64 input in fp64, by GroupNorm's kernels.

    The layer is a subclass of torch.nn.InstanceNorm1d with another forward, so that checkpoints load both
    ways.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        momentum (float or None): The weight of a batch in the running statistics: new = (1 - momentum) * old
            + momentum * statistic of the batch. None updates nothing, as in torch.nn. Default: 0.1.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: False.
        track_running_stats (bool): Whether the layer keeps running statistics, and uses them in eval.
            Default: False.
        device: The device of parameters and buffers. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.

    Shape:
        - input: (N, C, L) or (C, L), of fp16, bf16, fp32 or fp64, in any strides.
        - residual (optional, the second argument of a call): input's shape, dtype and device, in any strides.
        - output: input's shape and dtype. It has the strides that torch.nn's layer gives it.

    Returns:
        A call ``layer(input, residual=None)`` returns activation(norm(input) + residual).

    Raises:
        TypeError: The constructor got an unknown argument, or the residual is not a tensor.
        ValueError: The activation is unknown, the input has another number of dimensions or, if affine, of
            channels, a channel of a sample has a single value, or the residual's shape, dtype or device
            differs from the input's.
        RuntimeError: Sizes or devices do not match, as in torch.nn.

    Input with another number of channels than num_features, if not affine, gives a warning, as in torch.nn.

    Example:
        >>> norm = bnfast.InstanceNorm1d(16, affine=True, activation="leaky_relu")
        >>> x, shortcut = torch.randn(8, 16, 10), torch.randn(8, 16, 10)
        >>> norm(x).shape  # leaky_relu(norm(x))
        torch.Size([8, 16, 10])
        >>> y = norm(x, shortcut)  # leaky_relu(norm(x) + shortcut)

    References:
        Ulyanov, Vedaldi and Lempitsky 2016, "Instance Normalization: The Missing Ingredient for Fast
        Stylization", arXiv 1607.08022.
    """


class InstanceNorm3d(_Kernels, nn.InstanceNorm3d):
    """Instance normalization of (N, C, D, H, W) or (C, D, H, W) input on bnfast's kernels.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each channel of a sample. With track_running_stats, training updates
    running statistics with the samples' average of the statistic and the unbiased variance, which reads x
    once more, and eval normalizes with them; without, training and eval are the same. Statistics are computed
    in fp32, for fp64 input in fp64, by GroupNorm's kernels.

    The layer is a subclass of torch.nn.InstanceNorm3d with another forward, so that checkpoints load both
    ways.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        momentum (float or None): The weight of a batch in the running statistics: new = (1 - momentum) * old
            + momentum * statistic of the batch. None updates nothing, as in torch.nn. Default: 0.1.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: False.
        track_running_stats (bool): Whether the layer keeps running statistics, and uses them in eval.
            Default: False.
        device: The device of parameters and buffers. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.

    Shape:
        - input: (N, C, D, H, W) or (C, D, H, W), of fp16, bf16, fp32 or fp64, in any strides.
        - residual (optional, the second argument of a call): input's shape, dtype and device, in any strides.
        - output: input's shape and dtype. It is channels_last_3d if input is, and contiguous otherwise.

    Returns:
        A call ``layer(input, residual=None)`` returns activation(norm(input) + residual).

    Raises:
        TypeError: The constructor got an unknown argument, or the residual is not a tensor.
        ValueError: The activation is unknown, the input has another number of dimensions or, if affine, of
            channels, a channel of a sample has a single value, or the residual's shape, dtype or device
            differs from the input's.
        RuntimeError: Sizes or devices do not match, as in torch.nn.

    Input with another number of channels than num_features, if not affine, gives a warning, as in torch.nn.

    Example:
        >>> norm = bnfast.InstanceNorm3d(16, affine=True, activation="leaky_relu")
        >>> x, shortcut = torch.randn(2, 16, 4, 4, 4), torch.randn(2, 16, 4, 4, 4)
        >>> norm(x).shape  # leaky_relu(norm(x))
        torch.Size([2, 16, 4, 4, 4])
        >>> y = norm(x, shortcut)  # leaky_relu(norm(x) + shortcut)

    References:
        Ulyanov, Vedaldi and Lempitsky 2016, "Instance Normalization: The Missing Ingredient for Fast
        Stylization", arXiv 1607.08022.
    """
