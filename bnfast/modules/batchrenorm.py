"""BatchRenorm1d, BatchRenorm2d, BatchRenorm3d: Batch Renormalization as layers."""

from __future__ import annotations

import math
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions, Renorm
from ..ops.batch_norm import batch_renorm
from ..ops.op import Call
from .drop_in import OptionalBias, says_what_it_takes
from .replaceable import TO_SYNC, Replaceable


class _BatchRenorm(Replaceable, OptionalBias, nn.modules.batchnorm._BatchNorm):
    """Batch Renormalization (Ioffe 2017, arXiv 1702.03275, algorithm 1): training normalizes with the batch's
    statistics, corrected towards the running ones, so that training and eval compute the same as far as the
    limits allow. For small and for not identically distributed batches.

    The arguments are BatchNorm's, with the paper's momentum of 0.01, and the schedule of the limits, in
    training batches. A batch is governed by the number of batches *before* it (num_batches_tracked as it
    comes in): up to `warmup_steps` of them r = 1 and d = 0, as in BatchNorm; from there r_max rises in a
    straight line from 1 to `r_max` at `r_max_steps`, and d_max from 0 to `d_max` at `d_max_steps`. All of
    it is read on the device: nothing waits for the GPU.

    State: BatchNorm's five keys, so that checkpoints load strictly both ways, and eval is the same. The
    schedule goes by num_batches_tracked: call `reset_schedule()` where a trained BatchNorm's counter has
    come along.

    skip_nonfinite: a channel whose batch holds inf or NaN, as in a step that mixed precision's loss scaling
    throws away, leaves its running statistics alone (else they, and with them r and d, are NaN for ever). It
    is the batch that is looked at, not what is stored: fp16 statistics may overflow. A skipped batch counts:
    it moves the schedule on.

    momentum may be set to None later, as torch.optim.swa_utils.update_bn does: then r = 1, d = 0, and running
    statistics become the average over all batches since they were reset (of the mean, and of sigma), and
    nothing is skipped.

    Raises RuntimeError in the recomputation of activation checkpointing: the running statistics have moved by
    then, and r and d with them, so that gradients would be wrong."""

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
        """Starts the schedule of the limits anew: sets num_batches_tracked to 0, and nothing else."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.zero_()

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
        renorm = Renorm(
            float(self.r_max),
            float(self.d_max),
            float(self.warmup_steps),
            float(self.r_max_steps),
            float(self.d_max_steps),
            self.skip_nonfinite,
        )
        options = BatchNormOptions(self.training, self.momentum, self.eps, renorm)
        buffers = (mean, variance, self.num_batches_tracked if self.training else None)
        return batch_renorm(Call(input, self.weight, self.bias, residual, activation, options, buffers))

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, "
            f"warmup_steps={self.warmup_steps}, r_max_steps={self.r_max_steps}, "
            f"d_max_steps={self.d_max_steps}{'' if self.skip_nonfinite else ', skip_nonfinite=False'}"
        )

    def _lost_in(self, by: str, caller: FrameType) -> str | None:
        if by not in TO_SYNC:  # a layer of constants renormalizes as little as this one in eval
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


class BatchRenorm1d(_BatchRenorm):
    __doc__ = f"{_BatchRenorm.__doc__}\n\n    input: [N, C] or [N, C, L]."
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class BatchRenorm2d(_BatchRenorm):
    __doc__ = f"{_BatchRenorm.__doc__}\n\n    input: [N, C, H, W], contiguous or channels_last."
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class BatchRenorm3d(_BatchRenorm):
    __doc__ = f"{_BatchRenorm.__doc__}\n\n    input: [N, C, D, H, W], contiguous or channels_last_3d."
    _check_input_dim = nn.BatchNorm3d._check_input_dim
