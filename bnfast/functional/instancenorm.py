"""torch.nn.functional.instance_norm over GroupNorm's kernels, and in eval over BatchNorm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..dispatch import KERNELS, TORCH, TRITON, ordinary, path, refuse_dtensor
from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.layouts import format_in_instance_norm, ordered
from ..reference.batchnorm import wide
from .arguments import (
    as_float,
    check_residual,
    flat,
    followed_by,
    in_format_of,
    needs_float,
    residual_fits,
    seen_as_graph,
    vectors_fit,
    wants_gradient,
)
from .batchnorm import counting_batch_norm

# more than one value a channel and sample, or torch's ValueError
verify_spatial_size: Callable[[torch.Size], None] = getattr(F, "_verify_spatial_size")  # noqa: B009

if TRITON:
    from ..autograd import groupnorm as autograd


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Instance normalization as torch.nn.functional.instance_norm, and act(normalized + residual) with it.

    y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    With `use_input_stats`, mean and variance are those of each channel of a sample, and the running
    statistics, where given, are updated in place: new = (1 - momentum) * old + momentum * the samples'
    average of the statistic, with the unbiased variance. Without, the running statistics are what input is
    normalized with. Statistics are computed in fp32, for fp64 input in fp64.

    Args:
        input (Tensor): What is normalized.
        running_mean (Tensor, optional): [C], of any floating dtype. Required without use_input_stats.
        running_var (Tensor, optional): [C], of any floating dtype. Required without use_input_stats.
        weight (Tensor, optional): The scale of each channel, [C], of any floating dtype. Default: None, which
            is 1.
        bias (Tensor, optional): The shift of each channel, [C], of any floating dtype. Default: None, which
            is 0.
        use_input_stats (bool): Whether to normalize with the statistics of the input. Default: True.
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
          memory format, where torch's are contiguous.

    Returns:
        A tensor of input's shape and dtype, under autocast too.

    Raises:
        ValueError: A channel of a sample has a single value, the activation is unknown, or the residual's
            shape, dtype or device differs from the input's. All before anything is updated.
        RuntimeError: Sizes or devices do not match, as in torch.nn.functional.instance_norm.
        TypeError: The residual is not a tensor, or an argument has a type that torch refuses.

    Example:
        >>> x = torch.randn(8, 16, 4, 4)
        >>> y = bnfast.functional.instance_norm(x, activation=("leaky_relu", 0.2))
        >>> torch.allclose(y, F.leaky_relu(F.instance_norm(x), 0.2), atol=1e-5)
        True

    References:
        Ulyanov, Vedaldi and Lempitsky 2016, "Instance Normalization: The Missing Ingredient for Fast
        Stylization", arXiv 1607.08022.
    """
    if (
        has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
        and not torch.compiler.is_compiling()
    ):
        return handle_torch_function(
            instance_norm, (input, running_mean, running_var, weight, bias, residual), input,
            running_mean=running_mean, running_var=running_var, weight=weight, bias=bias,
            use_input_stats=use_input_stats, momentum=momentum, eps=eps, activation=activation,
            residual=residual,
        )  # fmt: skip
    if not isinstance(input, Tensor):  # torch's error
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if type(momentum) is not float or type(eps) is not float or type(use_input_stats) is not bool:
        momentum, eps = _as_torch_takes_them(use_input_stats, momentum, eps)
    after = None if activation is None else Activation.of(activation)
    if residual is not None:
        check_residual(input, residual)
    way = path(input)
    if (
        way != TORCH
        and _fits(way, input, running_mean, running_var, weight, bias)
        and (residual is None or residual_fits(way, residual))
    ):
        if not use_input_stats:
            # torch's batch_norm refuses a negative eps, and its instance_norm does not
            if running_mean is not None and eps >= 0.0:
                x = ordered(input, format_in_instance_norm)
                return counting_batch_norm(
                    x, running_mean, running_var, weight, bias, False, momentum, eps, None, None, after,
                    residual,
                )  # fmt: skip
        elif input.numel() != input.size(0) * input.size(1):  # one value a channel: torch's ValueError
            options = (way, after, input.size(1), eps)
            x = ordered(input, format_in_instance_norm)
            y = autograd.normalize(x, weight, bias, residual, options)
            if y is not None:
                if running_mean is not None and running_var is not None:
                    _track(input.detach(), running_mean, running_var, momentum)
                return y
    bare = ordinary(way, input, running_mean, running_var, weight, bias, residual)
    if bare is not None:
        *given, residual = bare
        given += (use_input_stats, momentum, eps)
        return instance_norm(*given, activation=after, residual=residual)
    y = _torch_instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )  # fmt: skip
    return followed_by(y, after, residual)


def _as_torch_takes_them(use_input_stats: Any, momentum: Any, eps: Any) -> tuple[float, float]:
    """Integers and 0-d tensors, which torch.nn.functional.instance_norm takes for floats, or its
    TypeError."""
    x = torch.ones(1, 1, 2)
    F.instance_norm(x, x[0, :, 0], x[0, :, 1], None, None, use_input_stats, momentum, eps)
    return float(momentum), float(eps)


def _fits(
    way: int,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> bool:
    """Whether the kernels, and the update of the running statistics, can take these arguments."""
    if not 2 <= x.dim() <= 5 or not vectors_fit(way, x, weight, bias, running_mean, running_var):
        return False
    if running_mean is None or running_var is None:
        return running_mean is running_var
    if (running_mean.requires_grad or running_var.requires_grad) and torch.is_grad_enabled():
        return False
    if way == KERNELS and not torch.is_inference_mode_enabled():  # nothing may update inference tensors there
        return not (running_mean.is_inference() or running_var.is_inference())
    return True


@torch.no_grad()
def _track(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    """One update. It reads x once more, in launches of torch's own: the kernels' table has a mean, but of the
    variance only 1 / sqrt(variance + eps), which knows nothing of a variance far below eps. Half precision
    is copied to fp32 for it, as torch would round the moments to x's type."""
    variance, mean = torch.var_mean(wide(x), list(range(2, x.dim())), correction=1)
    for running, statistic in ((running_mean, mean.mean(0)), (running_var, variance.mean(0))):
        old = running.to(torch.promote_types(running.dtype, statistic.dtype))
        running.copy_((1 - momentum) * old + momentum * statistic)


def _torch_instance_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """torch's own instance_norm, with a result as the kernels' is."""
    refuse_dtensor(x, running_mean, running_var, weight, bias)
    wide, given = x, (running_mean, running_var, weight, bias)
    if needs_float(x, weight, bias):
        wide, given = x.float(), (running_mean, running_var, as_float(weight), as_float(bias))
    if x.dim() > 3 and (wants_gradient(x, weight, bias) or seen_as_graph()):
        if use_input_stats:
            verify_spatial_size(x.size())  # of x as it came
        y = F.instance_norm(flat(wide), *given, use_input_stats, momentum, eps).view_as(x)
    else:
        y = F.instance_norm(wide, *given, use_input_stats, momentum, eps)
    return in_format_of(x, y if wide is x else y.to(x.dtype), format_in_instance_norm)
