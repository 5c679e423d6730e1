"""torch.nn.functional's signatures over the kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..dispatch import KERNELS, TORCH, TRITON, ordinary, path
from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.layouts import format_in_batch_norm, ordered
from ..reference.batchrenorm import Limits
from .arguments import check_residual, followed_by, residual_fits, vectors_fit
from .torch_batchnorm import torch_batch_norm, verify_batch_size

_FLOAT_OR_NONE = (float, type(None))

if TRITON:
    from ..autograd import batchnorm as autograd


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
    return counting_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, None, None,
        None if activation is None else Activation.of(activation), residual,
    )  # fmt: skip


def counting_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    batches: Tensor | None,
    renorm: tuple[Limits, bool] | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """batch_norm that also counts the batch, on the device: batches, an int64 scalar tensor, or None.
    momentum None is the cumulative average, with the factor 1 / (batches + 1)."""
    if residual is not None:
        check_residual(input, residual)
    if type(training) is not bool or type(momentum) not in _FLOAT_OR_NONE or type(eps) is not float:
        training, momentum, eps = _as_torch_takes_them(training, momentum, eps)
    way = path(input)
    if eps <= 0.0 and (training or eps < 0.0):  # torch has raised these since 2.13
        needed = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {needed}, but got {eps}")
    if (
        way != TORCH
        and _fits(way, input, running_mean, running_var, weight, bias, training, batches)
        and (residual is None or residual_fits(way, residual))
    ):
        if training and input.size(0) == 1:
            verify_batch_size(input.size())
        factor = 0.0 if momentum is None else momentum
        buffers = (running_mean, running_var, batches)
        options = (way, activation, training, momentum is None, factor, eps, renorm, buffers)
        y = autograd.normalize(
            ordered(input, format_in_batch_norm), weight, bias, residual, options
        )  # fmt: skip
        if y is not None:
            return y
    bare = ordinary(way, input, running_mean, running_var, weight, bias, residual)
    if bare is not None:
        carried = (input, running_mean, running_var, weight, bias, residual)
        if has_torch_function_variadic(*carried):  # a layer's call: the function's has been handled
            return handle_torch_function(
                counting_batch_norm, carried, input, running_mean, running_var, weight, bias, training,
                momentum, eps, batches, renorm, activation, residual,
            )  # fmt: skip
        *given, residual = bare
        given += (training, momentum, eps, batches, renorm, activation, residual)
        return counting_batch_norm(*given)
    y = torch_batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, batches, renorm
    )
    return followed_by(y, activation, residual)


def _as_torch_takes_them(training: Any, momentum: Any, eps: Any) -> tuple[bool, float | None, float]:
    """Integers and 0-d tensors, which torch.nn.functional.batch_norm takes for floats, or its TypeError."""
    x = torch.ones(2, 1)
    F.batch_norm(x, x[0], x[1], None, None, training, 0.0 if momentum is None else momentum, eps)
    return training, None if momentum is None else float(momentum), float(eps)


def _fits(
    way: int,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    batches: Tensor | None,
) -> bool:
    """Whether the kernels can take these arguments. What they cannot take goes to torch, which raises its
    own errors.
    """
    if not 2 <= x.dim() <= 5 or (not training and (running_mean is None or running_var is None)):
        return False
    if not vectors_fit(way, x, running_mean, running_var, weight, bias):
        return False
    if running_mean is not None and running_var is not None:
        if (running_mean.requires_grad or running_var.requires_grad) and torch.is_grad_enabled():
            return False
        # inference tensors are updated in inference mode only
        inference = (
            training and way == KERNELS and (running_mean.is_inference() or running_var.is_inference())
        )
        if inference and not torch.is_inference_mode_enabled():
            return False
    elif running_mean is not None or running_var is not None:
        return False
    return batches is None or (
        batches.device == x.device and batches.dtype == torch.int64 and batches.numel() == 1
    )
