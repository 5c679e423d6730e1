"""Layers that apply an activation and take a residual, without the kernels: what `bnfast.revert` makes of
layers that carry an activation, which torch.nn's have not. The same names and state."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.epilogue import Activation
from ..ops.arguments import check_residual, followed_by
from .drop_in import DropIn
from .frozenbatchnorm import TorchFrozenBatchNorm2d
from .replaceable import Replaceable


class _Plain(DropIn):
    """Mixed into a subclass of a plain torch layer, before it."""

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        if residual is not None:
            check_residual(input, residual)
        return followed_by(super(DropIn, self).forward(input), activation, residual)


class BatchNorm1d(_Plain, Replaceable, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, then the activation."""


class BatchNorm2d(_Plain, Replaceable, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, then the activation."""


class BatchNorm3d(_Plain, Replaceable, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, then the activation."""


class FrozenBatchNorm2d(_Plain, TorchFrozenBatchNorm2d):
    """A BatchNorm2d of constants, then the activation."""

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        input, residual = self.widened(input, residual)
        return super().normalize(input, activation, residual)


class GroupNorm(_Plain, nn.GroupNorm):
    """torch.nn.GroupNorm, then the activation."""


class InstanceNorm1d(_Plain, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d, then the activation."""


class InstanceNorm2d(_Plain, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d, then the activation."""


class InstanceNorm3d(_Plain, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d, then the activation."""


class LayerNorm(_Plain, nn.LayerNorm):
    """torch.nn.LayerNorm, then the activation."""
