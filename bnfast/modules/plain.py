"""Layers that apply an activation and take a residual in plain torch. `bnfast.revert` makes them of layers
with an activation, which torch.nn layers do not have. They have the same names and the same state."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.epilogue import Activation
from ..ops.arguments import check_residual, followed_by
from .frozenbatchnorm import TorchFrozenBatchNorm2d
from .mixins import NormMixin
from .replaceable import Replaceable


class _Plain(NormMixin):
    """A mixin that precedes a plain torch layer among the bases of a class."""

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        if residual is not None:
            check_residual(input, residual)
        return followed_by(super(NormMixin, self).forward(input), activation, residual)


class BatchNorm1d(_Plain, Replaceable, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, then the activation."""


class BatchNorm2d(_Plain, Replaceable, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, then the activation."""


class BatchNorm3d(_Plain, Replaceable, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, then the activation."""


class FrozenBatchNorm2d(_Plain, TorchFrozenBatchNorm2d):
    """A BatchNorm2d with constant statistics and affine, then the activation."""

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
