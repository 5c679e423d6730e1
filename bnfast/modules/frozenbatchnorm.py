"""FrozenBatchNorm2d: a BatchNorm whose statistics and affine are constants, with torchvision's four keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import Activation, ActivationLike
from ..functional.batchnorm import batch_norm
from .drop_in import DropIn


class TorchFrozenBatchNorm2d(nn.Module):
    """The layer in plain torch: what bnfast.revert and torch.jit.script have for FrozenBatchNorm2d."""

    # detectron2's layer shares the keys, and takes eps out of the running_var of a lower version.
    _version = 3

    if TYPE_CHECKING:  # torch.jit.script would read these
        eps: float
        weight: Tensor
        bias: Tensor
        running_mean: Tensor
        running_var: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            start = torch.ones if name in ("weight", "running_var") else torch.zeros
            self.register_buffer(name, start(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A BatchNorm's checkpoint: what it counted is not among what is unexpected.
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FrozenBatchNorm2d(DropIn, TorchFrozenBatchNorm2d):
    """BatchNorm2d with constant statistics and affine, in training as in eval; torchvision.ops and detectron2
    have layers of this name. input: [N, C, H, W], contiguous or channels_last.

    weight, bias, running_mean and running_var are buffers, and all there is in the state_dict. It loads a
    BatchNorm2d's with strict=True, num_batches_tracked being dropped. Gradients go to the input and the
    residual only.

    The output has the input's dtype, as detectron2's, where torchvision's has the buffers' if that is wider.
    Raises ValueError for an input that is not 4-D."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
    ) -> None:
        super().__init__(num_features, eps, device, dtype)
        self.activation = Activation.of(activation)

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        self._check_input_dim(input)
        return batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps,
            activation=activation, residual=residual,
        )  # fmt: skip
