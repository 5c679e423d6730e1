"""FrozenBatchNorm2d: a BatchNorm whose statistics and affine are constants, with torchvision's four keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions
from ..ops.batch_norm import batch_norm
from ..ops.op import Call
from .drop_in import DropIn, says_what_it_takes


class TorchFrozenBatchNorm2d(nn.Module):
    """The layer in plain torch: what bnfast.revert and torch.jit.script have for FrozenBatchNorm2d."""

    # As detectron2's, which shares the keys: its older releases take eps out of a lower one's running_var.
    _version = 3

    keep_dtype = False
    __constants__ = ("keep_dtype",)  # or torch.jit.script would not see what a class has

    if TYPE_CHECKING:  # torch.jit.script would read these
        eps: float
        weight: Tensor
        bias: Tensor
        running_mean: Tensor
        running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        keep_dtype: bool = False,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.keep_dtype = num_features, eps, keep_dtype
        for name in ("weight", "bias", "running_mean", "running_var"):
            start = torch.ones if name in ("weight", "running_var") else torch.zeros
            self.register_buffer(name, start(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        if self.keep_dtype:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return input * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    def widened(self, input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both in the output's dtype, which the residual may be of already."""
        dtype = input.dtype
        if not self.keep_dtype:
            for constant in (self.weight, self.bias, self.running_mean, self.running_var):
                dtype = torch.promote_types(dtype, constant.dtype)
        if isinstance(residual, Tensor) and residual.dtype == input.dtype:
            residual = residual.to(dtype)
        return input.to(dtype), residual

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}{', keep_dtype=True' if self.keep_dtype else ''}"

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

    The output has the wider dtype of the input's and the buffers', as torchvision's: fp32 for fp16 input and
    fp32 buffers, as under autocast. With keep_dtype it has the input's, as detectron2's: fewer bytes move.
    residual: of the output's dtype or of the input's.

    Raises ValueError for an input that is not 4-D, and for a residual that is not as said."""

    @says_what_it_takes
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        keep_dtype: bool = False,
        activation: ActivationLike = None,
    ) -> None:
        super().__init__(num_features, eps, device, dtype, keep_dtype=keep_dtype)
        self.activation = Activation.of(activation)

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")
        mean, variance, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if not self.keep_dtype:
            input, residual = self.widened(input, residual)
            mean, variance, weight, bias = (t.to(input.dtype) for t in (mean, variance, weight, bias))
        options, buffers = BatchNormOptions(False, 0.0, self.eps), (mean, variance, None)
        return batch_norm(Call(input, weight, bias, residual, activation, options, buffers))
