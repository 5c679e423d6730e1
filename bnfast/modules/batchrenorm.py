"""BatchRenorm1d, BatchRenorm2d, BatchRenorm3d: Batch Renormalization as layers."""

from __future__ import annotations

import math
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions, Renorm, new
from ..ops.batch_renorm import run_batch_renorm
from ..ops.op import Call
from .mixins import BiasMixin, says_what_it_takes
from .replaceable import TO_SYNC, Replaceable

LIMITS = ("r_max", "d_max", "warmup_steps", "r_max_steps", "d_max_steps")


class _BatchRenorm(Replaceable, BiasMixin, nn.modules.batchnorm._BatchNorm):
    """The constructor and forward of all three. BatchRenorm2d has the documentation."""

    @says_what_it_takes
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 5000,
        r_max_steps: int = 40000,
        d_max_steps: int = 25000,
        skip_nonfinite: bool = True,
        track_running_stats: bool = True,
        activation: ActivationLike = None,
    ) -> None:
        if momentum is None:
            raise ValueError(
                "BatchRenorm momentum must be a number: a cumulative average makes r and d stale"
            )
        if not track_running_stats:
            raise ValueError(
                "BatchRenorm track_running_stats must be True: it corrects towards these statistics"
            )
        if not r_max >= 1 or not d_max >= 0:
            raise ValueError(f"BatchRenorm needs r_max >= 1 and d_max >= 0, but got {r_max} and {d_max}")
        if not 0 <= warmup_steps <= min(r_max_steps, d_max_steps) < math.inf:
            raise ValueError(
                "BatchRenorm needs 0 <= warmup_steps <= r_max_steps, d_max_steps, but got "
                f"{warmup_steps}, {r_max_steps}, {d_max_steps}"
            )
        super().__init__(num_features, eps, momentum, affine, True, device=device, dtype=dtype)
        self._without_bias(unless=bias)
        self.activation = Activation.of(activation)
        self.r_max, self.d_max, self.warmup_steps = r_max, d_max, warmup_steps
        self.r_max_steps, self.d_max_steps, self.skip_nonfinite = r_max_steps, d_max_steps, skip_nonfinite

    def reset_schedule(self) -> None:
        """Restarts the schedule of the limits: sets num_batches_tracked to 0, and nothing else."""
        self.num_batches_tracked.zero_()  # type: ignore[union-attr]

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        self._check_input_dim(input)
        mean, variance = self.running_mean, self.running_var
        if mean is None or variance is None:
            raise RuntimeError(
                f"{type(self).__name__} has lost its running statistics, which it corrects towards, as to "
                "torch.func.replace_all_batch_norm_modules_: use bnfast.revert(model) before, which makes "
                "BatchNorms"
            )
        if self.training and not self.track_running_stats:
            raise RuntimeError(
                f"{type(self).__name__} cannot train with track_running_stats=False, which Lightning's "
                "BaseFinetuning.freeze sets: call eval() on the layer, which keeps its running statistics"
            )
        limits = [float(getattr(self, name)) for name in LIMITS]
        renorm = new(Renorm, (*limits, self.skip_nonfinite))
        options = BatchNormOptions(self.training, self.momentum, self.eps, renorm)
        buffers = (mean, variance, self.num_batches_tracked if self.training else None)
        return run_batch_renorm(Call(input, self.weight, self.bias, residual, activation, options, buffers))

    def extra_repr(self) -> str:
        shown = [super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in LIMITS)]
        return ", ".join([*shown, *([] if self.skip_nonfinite else ["skip_nonfinite=False"])])

    def _lost_in(self, by: str, caller: FrameType) -> str | None:
        if by not in TO_SYNC:  # a frozen layer computes what this one computes in eval
            return super()._lost_in(by, caller)
        return (
            "renormalizes, which torch.nn.SyncBatchNorm does not: convert the model's other layers one by "
            "one, or replace this one by a BatchNorm with the same state_dict first, as bnfast.revert does"
        )

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script knows no {type(self).__name__}: replace it by a BatchNorm with the same "
            "state_dict, which is equal in eval, or use torch.export"
        )


class BatchRenorm2d(_BatchRenorm):
    """Batch Renormalization of (N, C, H, W) input, which torch.nn does not have.

    In training y = activation(((x - mean) / sigma * r + d) * weight + bias + residual), with the batch's mean
    and sigma = sqrt(variance + eps), r = sigma / running sigma and d = (mean - running mean) / running sigma,
    both clipped and without a gradient. So training and eval compute the same as far as the limits of r and d
    allow, which helps small batches and batches that are not identically distributed. In eval the layer is
    BatchNorm.

    The limits follow a schedule, in training batches. A batch is governed by the number of batches *before*
    it (num_batches_tracked as it comes in): up to `warmup_steps` of them r = 1 and d = 0, as in BatchNorm;
    from there the limit of r rises in a straight line from 1 to `r_max` at `r_max_steps`, and that of d from
    0 to `d_max` at `d_max_steps`. All of it is read on the device: nothing waits for the GPU.

    The state has BatchNorm's five keys, so checkpoints load strictly both ways, and eval is the same. The
    schedule goes by num_batches_tracked: call `reset_schedule()` after loading a trained BatchNorm's counter.

    `skip_nonfinite` is for batches with infinity or NaN, as in a step that the loss scaling of mixed
    precision throws away. Without it the running statistics, and with them r and d, would be NaN for ever.
    The check looks at the batch and not at what is stored: fp16 statistics may overflow. A skipped batch
    counts: it moves the schedule on.

    momentum may be set to None later, as torch.optim.swa_utils.update_bn does. Then r = 1 and d = 0, the
    running statistics become the average (of the mean, and of sigma) over all batches since they were reset,
    and nothing is skipped.

    In the recomputation of activation checkpointing the layer raises: the running statistics have moved by
    then, and r and d with them, so that gradients would be wrong.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        momentum (float): The weight of a batch in the running statistics. Default: 0.01, as in the paper.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: True.
        device: The device of parameters and buffers. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        r_max (float): The limit of r from batch `r_max_steps` on: r is clipped to [1 / r_max, r_max].
            Default: 3.0.
        d_max (float): The limit of d from batch `d_max_steps` on: d is clipped to [-d_max, d_max]. Default:
            5.0.
        warmup_steps (int): The number of training batches with r = 1 and d = 0. Default: 5000.
        r_max_steps (int): The batch at which the limit of r reaches `r_max`. Default: 40000.
        d_max_steps (int): The batch at which the limit of d reaches `d_max`. Default: 25000.
        skip_nonfinite (bool): Whether a channel whose batch holds infinity or NaN leaves its running
            statistics alone. Default: True.
        track_running_stats (bool): Must be True, since the layer corrects towards these statistics.
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
        ValueError: momentum is None or track_running_stats False in the constructor, the limits or their
            schedule are out of order, the activation is unknown, or BatchNorm would refuse the call too.
        RuntimeError: The running statistics are missing, or are not tracked in training; the forward runs
            again to recompute activations in a backward (checkpointing); sizes or devices do not match.

    Example:
        >>> norm = bnfast.BatchRenorm2d(16, warmup_steps=100, activation="relu")
        >>> x, shortcut = torch.randn(8, 16, 4, 4), torch.randn(8, 16, 4, 4)
        >>> norm(x).shape  # relu(norm(x))
        torch.Size([8, 16, 4, 4])
        >>> y = norm(x, shortcut)  # relu(norm(x) + shortcut)
        >>> trained = nn.BatchNorm2d(16)
        >>> _ = norm.load_state_dict(trained.state_dict())  # the same keys
        >>> norm.reset_schedule()

    References:
        Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        arXiv 1702.03275, algorithm 1.
    """

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class BatchRenorm1d(_BatchRenorm):
    """Batch Renormalization of (N, C) or (N, C, L) input, which torch.nn does not have.

    In training y = activation(((x - mean) / sigma * r + d) * weight + bias + residual), with the batch's mean
    and sigma = sqrt(variance + eps), r = sigma / running sigma and d = (mean - running mean) / running sigma,
    both clipped and without a gradient. So training and eval compute the same as far as the limits of r and d
    allow, which helps small batches and batches that are not identically distributed. In eval the layer is
    BatchNorm.

    The limits follow a schedule, in training batches. A batch is governed by the number of batches *before*
    it (num_batches_tracked as it comes in): up to `warmup_steps` of them r = 1 and d = 0, as in BatchNorm;
    from there the limit of r rises in a straight line from 1 to `r_max` at `r_max_steps`, and that of d from
    0 to `d_max` at `d_max_steps`. All of it is read on the device: nothing waits for the GPU.

    The state has BatchNorm's five keys, so checkpoints load strictly both ways, and eval is the same. The
    schedule goes by num_batches_tracked: call `reset_schedule()` after loading a trained BatchNorm's counter.

    `skip_nonfinite` is for batches with infinity or NaN, as in a step that the loss scaling of mixed
    precision throws away. Without it the running statistics, and with them r and d, would be NaN for ever.
    The check looks at the batch and not at what is stored: fp16 statistics may overflow. A skipped batch
    counts: it moves the schedule on.

    momentum may be set to None later, as torch.optim.swa_utils.update_bn does. Then r = 1 and d = 0, the
    running statistics become the average (of the mean, and of sigma) over all batches since they were reset,
    and nothing is skipped.

    In the recomputation of activation checkpointing the layer raises: the running statistics have moved by
    then, and r and d with them, so that gradients would be wrong.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        momentum (float): The weight of a batch in the running statistics. Default: 0.01, as in the paper.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: True.
        device: The device of parameters and buffers. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        r_max (float): The limit of r from batch `r_max_steps` on: r is clipped to [1 / r_max, r_max].
            Default: 3.0.
        d_max (float): The limit of d from batch `d_max_steps` on: d is clipped to [-d_max, d_max]. Default:
            5.0.
        warmup_steps (int): The number of training batches with r = 1 and d = 0. Default: 5000.
        r_max_steps (int): The batch at which the limit of r reaches `r_max`. Default: 40000.
        d_max_steps (int): The batch at which the limit of d reaches `d_max`. Default: 25000.
        skip_nonfinite (bool): Whether a channel whose batch holds infinity or NaN leaves its running
            statistics alone. Default: True.
        track_running_stats (bool): Must be True, since the layer corrects towards these statistics.
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
        ValueError: momentum is None or track_running_stats False in the constructor, the limits or their
            schedule are out of order, the activation is unknown, or BatchNorm would refuse the call too.
        RuntimeError: The running statistics are missing, or are not tracked in training; the forward runs
            again to recompute activations in a backward (checkpointing); sizes or devices do not match.

    Example:
        >>> norm = bnfast.BatchRenorm1d(16, warmup_steps=100, activation="relu")
        >>> x, shortcut = torch.randn(8, 16, 10), torch.randn(8, 16, 10)
        >>> norm(x).shape  # relu(norm(x))
        torch.Size([8, 16, 10])
        >>> y = norm(x, shortcut)  # relu(norm(x) + shortcut)
        >>> trained = nn.BatchNorm1d(16)
        >>> _ = norm.load_state_dict(trained.state_dict())  # the same keys
        >>> norm.reset_schedule()

    References:
        Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        arXiv 1702.03275, algorithm 1.
    """

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class BatchRenorm3d(_BatchRenorm):
    """Batch Renormalization of (N, C, D, H, W) input, which torch.nn does not have.

    In training y = activation(((x - mean) / sigma * r + d) * weight + bias + residual), with the batch's mean
    and sigma = sqrt(variance + eps), r = sigma / running sigma and d = (mean - running mean) / running sigma,
    both clipped and without a gradient. So training and eval compute the same as far as the limits of r and d
    allow, which helps small batches and batches that are not identically distributed. In eval the layer is
    BatchNorm.

    The limits follow a schedule, in training batches. A batch is governed by the number of batches *before*
    it (num_batches_tracked as it comes in): up to `warmup_steps` of them r = 1 and d = 0, as in BatchNorm;
    from there the limit of r rises in a straight line from 1 to `r_max` at `r_max_steps`, and that of d from
    0 to `d_max` at `d_max_steps`. All of it is read on the device: nothing waits for the GPU.

    The state has BatchNorm's five keys, so checkpoints load strictly both ways, and eval is the same. The
    schedule goes by num_batches_tracked: call `reset_schedule()` after loading a trained BatchNorm's counter.

    `skip_nonfinite` is for batches with infinity or NaN, as in a step that the loss scaling of mixed
    precision throws away. Without it the running statistics, and with them r and d, would be NaN for ever.
    The check looks at the batch and not at what is stored: fp16 statistics may overflow. A skipped batch
    counts: it moves the schedule on.

    momentum may be set to None later, as torch.optim.swa_utils.update_bn does. Then r = 1 and d = 0, the
    running statistics become the average (of the mean, and of sigma) over all batches since they were reset,
    and nothing is skipped.

    In the recomputation of activation checkpointing the layer raises: the running statistics have moved by
    then, and r and d with them, so that gradients would be wrong.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        momentum (float): The weight of a batch in the running statistics. Default: 0.01, as in the paper.
        affine (bool): Whether the layer has a weight and a bias for each channel. Default: True.
        device: The device of parameters and buffers. Default: torch's default device.
        dtype (torch.dtype): Their dtype, which may differ from the input's. Default: torch's default dtype.
        bias (bool): Whether an affine layer has a bias beside its weight. Keyword only. Default: True.
        r_max (float): The limit of r from batch `r_max_steps` on: r is clipped to [1 / r_max, r_max].
            Default: 3.0.
        d_max (float): The limit of d from batch `d_max_steps` on: d is clipped to [-d_max, d_max]. Default:
            5.0.
        warmup_steps (int): The number of training batches with r = 1 and d = 0. Default: 5000.
        r_max_steps (int): The batch at which the limit of r reaches `r_max`. Default: 40000.
        d_max_steps (int): The batch at which the limit of d reaches `d_max`. Default: 25000.
        skip_nonfinite (bool): Whether a channel whose batch holds infinity or NaN leaves its running
            statistics alone. Default: True.
        track_running_stats (bool): Must be True, since the layer corrects towards these statistics.
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
        ValueError: momentum is None or track_running_stats False in the constructor, the limits or their
            schedule are out of order, the activation is unknown, or BatchNorm would refuse the call too.
        RuntimeError: The running statistics are missing, or are not tracked in training; the forward runs
            again to recompute activations in a backward (checkpointing); sizes or devices do not match.

    Example:
        >>> norm = bnfast.BatchRenorm3d(16, warmup_steps=100, activation="relu")
        >>> x, shortcut = torch.randn(2, 16, 4, 4, 4), torch.randn(2, 16, 4, 4, 4)
        >>> norm(x).shape  # relu(norm(x))
        torch.Size([2, 16, 4, 4, 4])
        >>> y = norm(x, shortcut)  # relu(norm(x) + shortcut)
        >>> trained = nn.BatchNorm3d(16)
        >>> _ = norm.load_state_dict(trained.state_dict())  # the same keys
        >>> norm.reset_schedule()

    References:
        Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        arXiv 1702.03275, algorithm 1.
    """

    _check_input_dim = nn.BatchNorm3d._check_input_dim
