"""torch.nn.functional's signatures over the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.records import BatchNormOptions, new
from ..ops import batch_norm as ops
from ..ops.op import Call


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalization as torch.nn.functional.batch_norm, and act(normalized + residual) with it.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Statistics are computed in fp32, for fp64 input in fp64. With `training`, mean and variance of each
    channel are the batch's, and the running statistics, where given, are updated in place: new = (1 -
    momentum) * old + momentum * statistic of the batch, with the unbiased variance. Otherwise the running
    statistics are used.

    Args:
        input (Tensor): What is normalized.
        running_mean (Tensor or None): [C], of any floating dtype. Required unless training.
        running_var (Tensor or None): [C], of any floating dtype. Required unless training.
        weight (Tensor, optional): The scale of each channel, [C], of any floating dtype. Default: None, which
            is 1.
        bias (Tensor, optional): The shift of each channel, [C], of any floating dtype. Default: None, which
            is 0.
        training (bool): Whether to normalize with the batch's statistics. Default: False.
        momentum (float): The weight of the batch in the running statistics. Default: 0.1.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        activation: The activation that is applied in the same kernels, after the residual: None, a name such
            as ``"relu"``, a name and its number such as ``("leaky_relu", 0.2)``, or torch's own module, class
            or function, such as ``nn.ReLU()``, ``nn.ReLU`` or ``F.relu``. bnfast.activation.NAMES lists the
            names. Keyword only. Default: None.
        residual (Tensor, optional): What is added to the normalized values before the activation, of input's
            shape, dtype and device, in any strides. Keyword only. Default: None.

    Shape:
        - input: (N, C, *), of fp16, bf16, fp32 or fp64, in any strides.
        - residual: as input.
        - output: as input. Contiguous, channels_last and channels_last_3d inputs give outputs of the same
          memory format, others contiguous ones.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        ValueError: In training, a channel has a single value or eps is not positive; the activation is
            unknown; or the residual's shape, dtype or device differs from the input's. All before anything is
            updated.
        RuntimeError: Sizes or devices do not match, as in torch.nn.functional.batch_norm.
        TypeError: The residual is not a tensor, or an argument has a type that torch refuses.

    Example:
        >>> x, mean, variance = torch.randn(8, 16, 4, 4), torch.zeros(16), torch.ones(16)
        >>> y = bnfast.functional.batch_norm(x, mean, variance, training=True, activation="relu")
        >>> torch.allclose(mean, 0.1 * x.mean((0, 2, 3)), atol=1e-6)
        True

    References:
        Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
        Covariate Shift", arXiv 1502.03167.
    """
    if (
        has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
        and not torch.compiler.is_compiling()
    ):
        return handle_torch_function(
            batch_norm, (input, running_mean, running_var, weight, bias, residual), input, running_mean,
            running_var, weight=weight, bias=bias, training=training, momentum=momentum, eps=eps,
            activation=activation, residual=residual,
        )  # fmt: skip
    if momentum is None or not isinstance(input, Tensor):  # torch's TypeError
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    activation = None if activation is None else Activation.of(activation)
    options = new(BatchNormOptions, (training, momentum, eps, None))
    buffers = (running_mean, running_var, None)
    return ops.batch_norm(new(Call, (input, weight, bias, residual, activation, options, buffers)))
