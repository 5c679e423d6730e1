"""BatchNorm1d, BatchNorm2d, BatchNorm3d: subclasses of torch.nn's layers with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions, new
from ..ops.batch_norm import run_batch_norm
from ..ops.op import Call
from .mixins import BiasMixin, says_what_it_takes
from .replaceable import Replaceable


class _Kernels(Replaceable, BiasMixin, nn.modules.batchnorm._BatchNorm):
    """The constructor and forward of all three. The rest is inherited: state_dict, buffers, repr, and
    checks of dimensions."""

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
        options = new(BatchNormOptions, (training, momentum, self.eps, None))
        call = (input, self.weight, self.bias, residual, activation, options, (mean, variance, batches))
        return run_batch_norm(new(Call, call))


class BatchNorm2d(_Kernels, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W) input: torch.nn's BatchNorm2d on bnfast's kernels.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each channel over the batch and all positions. In training they are the
    batch's, and the running statistics are updated with the mean and the unbiased variance; in eval they are
    the running statistics. Statistics are computed in fp32, for fp64 input in fp64. A training step launches
    two kernels forward and two backward.

    The layer is a subclass of torch.nn.BatchNorm2d with another forward: the state_dict, buffers, repr and
    checks are torch.nn's, so that checkpoints load both ways.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        momentum (float or None): The weight of a batch in the running statistics: new = (1 - momentum) * old
            + momentum * statistic of the batch. None makes them the average over all batches. Default: 0.1.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: True.
        track_running_stats (bool): Whether the layer keeps running statistics. Without them it uses the
            statistics of the batch in eval too. Default: True.
        device: The device of parameters and buffers. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.

    Shape:
        - input: (N, C, H, W), of fp16, bf16, fp32 or fp64, in any strides.
        - residual (optional, the second argument of a call): input's shape, dtype and device, in any strides.
        - output: input's shape and dtype. It is channels_last if input is, and contiguous otherwise.

    Returns:
        A call ``layer(input, residual=None)`` returns activation(norm(input) + residual).

    Raises:
        TypeError: The constructor got an unknown argument, or the residual is not a tensor.
        ValueError: The activation is unknown, the input has another number of dimensions, a channel has a
            single value in training, eps is not positive in training, or the residual's shape, dtype or
            device differs from the input's.
        RuntimeError: Sizes or devices do not match, as in torch.nn.

    A call that raises updates nothing, the counter of batches included.

    Example:
        >>> norm = bnfast.BatchNorm2d(16, activation="relu")
        >>> x, shortcut = torch.randn(8, 16, 4, 4), torch.randn(8, 16, 4, 4)
        >>> norm(x).shape  # relu(norm(x))
        torch.Size([8, 16, 4, 4])
        >>> y = norm(x, shortcut)  # relu(norm(x) + shortcut)

    References:
        Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
        Covariate Shift", arXiv 1502.03167, algorithm 1.
    """


class BatchNorm1d(_Kernels, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L) input: torch.nn's BatchNorm1d on bnfast's kernels.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each channel over the batch and all positions. In training they are the
    batch's, and the running statistics are updated with the mean and the unbiased variance; in eval they are
    the running statistics. Statistics are computed in fp32, for fp64 input in fp64. A training step launches
    two kernels forward and two backward.

    The layer is a subclass of torch.nn.BatchNorm1d with another forward: the state_dict, buffers, repr and
    checks are torch.nn's, so that checkpoints load both ways.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        momentum (float or None): The weight of a batch in the running statistics: new = (1 - momentum) * old
            + momentum * statistic of the batch. None makes them the average over all batches. Default: 0.1.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: True.
        track_running_stats (bool): Whether the layer keeps running statistics. Without them it uses the
            statistics of the batch in eval too. Default: True.
        device: The device of parameters and buffers. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.

    Shape:
        - input: (N, C) or (N, C, L), of fp16, bf16, fp32 or fp64, in any strides.
        - residual (optional, the second argument of a call): input's shape, dtype and device, in any strides.
        - output: input's shape and dtype. It has the strides that torch.nn's layer gives it.

    Returns:
        A call ``layer(input, residual=None)`` returns activation(norm(input) + residual).

    Raises:
        TypeError: The constructor got an unknown argument, or the residual is not a tensor.
        ValueError: The activation is unknown, the input has another number of dimensions, a channel has a
            single value in training, eps is not positive in training, or the residual's shape, dtype or
            device differs from the input's.
        RuntimeError: Sizes or devices do not match, as in torch.nn.

    A call that raises updates nothing, the counter of batches included.

    Example:
        >>> norm = bnfast.BatchNorm1d(16, activation="relu")
        >>> x, shortcut = torch.randn(8, 16, 10), torch.randn(8, 16, 10)
        >>> norm(x).shape  # relu(norm(x))
        torch.Size([8, 16, 10])
        >>> y = norm(x, shortcut)  # relu(norm(x) + shortcut)

    References:
        Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
        Covariate Shift", arXiv 1502.03167, algorithm 1.
    """


class BatchNorm3d(_Kernels, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W) input: torch.nn's BatchNorm3d on bnfast's kernels.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Mean and variance are those of each channel over the batch and all positions. In training they are the
    batch's, and the running statistics are updated with the mean and the unbiased variance; in eval they are
    the running statistics. Statistics are computed in fp32, for fp64 input in fp64. A training step launches
    two kernels forward and two backward.

    The layer is a subclass of torch.nn.BatchNorm3d with another forward: the state_dict, buffers, repr and
    checks are torch.nn's, so that checkpoints load both ways.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        momentum (float or None): The weight of a batch in the running statistics: new = (1 - momentum) * old
            + momentum * statistic of the batch. None makes them the average over all batches. Default: 0.1.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: True.
        track_running_stats (bool): Whether the layer keeps running statistics. Without them it uses the
            statistics of the batch in eval too. Default: True.
        device: The device of parameters and buffers. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.

    Shape:
        - input: (N, C, D, H, W), of fp16, bf16, fp32 or fp64, in any strides.
        - residual (optional, the second argument of a call): input's shape, dtype and device, in any strides.
        - output: input's shape and dtype. It is channels_last_3d if input is, and contiguous otherwise.

    Returns:
        A call ``layer(input, residual=None)`` returns activation(norm(input) + residual).

    Raises:
        TypeError: The constructor got an unknown argument, or the residual is not a tensor.
        ValueError: The activation is unknown, the input has another number of dimensions, a channel has a
            single value in training, eps is not positive in training, or the residual's shape, dtype or
            device differs from the input's.
        RuntimeError: Sizes or devices do not match, as in torch.nn.

    A call that raises updates nothing, the counter of batches included.

    Example:
        >>> norm = bnfast.BatchNorm3d(16, activation="relu")
        >>> x, shortcut = torch.randn(2, 16, 4, 4, 4), torch.randn(2, 16, 4, 4, 4)
        >>> norm(x).shape  # relu(norm(x))
        torch.Size([2, 16, 4, 4, 4])
        >>> y = norm(x, shortcut)  # relu(norm(x) + shortcut)

    References:
        Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
        Covariate Shift", arXiv 1502.03167, algorithm 1.
    """
