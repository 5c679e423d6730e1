"""FrozenBatchNorm2d: a BatchNorm whose statistics and affine are constants, with torchvision's four keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions
from ..ops.batch_norm import run_batch_norm
from ..ops.op import Call
from .mixins import NormMixin, says_what_it_takes


class TorchFrozenBatchNorm2d(nn.Module):
    """The layer in plain torch. bnfast.revert and torch.jit.script get it in place of FrozenBatchNorm2d."""

    # The version of detectron2's layer, which has the same keys. For a lower version, its older releases
    # subtract eps from running_var.
    _version = 3

    keep_dtype = False
    __constants__ = ("keep_dtype",)  # otherwise torch.jit.script does not see an attribute of the class

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
        """Converts both to the output's dtype, which the residual may have already."""
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
        # In a BatchNorm's checkpoint, the counter is not an unexpected key.
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FrozenBatchNorm2d(NormMixin, TorchFrozenBatchNorm2d):
    """BatchNorm2d whose statistics and affine are constants, in training as in eval.

    y = activation((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)

    torchvision.ops and detectron2 have layers of this name; torch.nn does not. weight, bias, running_mean and
    running_var are buffers, and all there is in the state_dict. It loads a BatchNorm2d's state_dict with
    strict=True and drops num_batches_tracked. Gradients go to the input and the residual only.

    Args:
        num_features (int): C, the number of channels of the input.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        device: The device of the buffers. Default: torch's default device.
        dtype (torch.dtype): The dtype of the buffers. Default: torch's default dtype.
        keep_dtype (bool): The output's dtype. With False it is the wider dtype of the input and the buffers,
            as in torchvision: fp32 for fp16 input and fp32 buffers, as under autocast. With True it is the
            input's, as in detectron2, and fewer bytes move. Keyword only. Default: False.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.

    Shape:
        - input: (N, C, H, W), in any strides.
        - residual (optional, the second argument of a call): input's shape and device, and the output's dtype
          or the input's, in any strides.
        - output: input's shape, in the dtype that keep_dtype says. Contiguous and channels_last inputs give
          outputs of the same memory format, others contiguous ones.

    Returns:
        A call ``layer(input, residual=None)`` returns activation(norm(input) + residual).

    Raises:
        TypeError: The constructor got an unknown argument, or the residual is not a tensor.
        ValueError: The activation is unknown, the input is not 4-D, or the residual is not as described
            above.

    Example:
        >>> trained = nn.BatchNorm2d(16)
        >>> norm = bnfast.FrozenBatchNorm2d(16, activation="relu")
        >>> _ = norm.load_state_dict(trained.state_dict())
        >>> norm(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
        >>> list(norm.parameters())
        []

    References:
        Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
        Covariate Shift", arXiv 1502.03167: the transform at inference.
    """

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
        return run_batch_norm(Call(input, weight, bias, residual, activation, options, buffers))
