"""InstanceNorm for op.py: GroupNorm with as many groups as channels, and running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ..dispatch import KERNELS, TORCH, choose_route, refuse_dtensor
from ..kernels.epilogue import Activation, ActivationLike
from ..kernels.layouts import format_in_instance_norm
from ..kernels.records import BatchNormOptions, new
from ..reference.batchnorm import wide
from . import group_norm, op
from .arguments import flat, in_float, in_format_of, overridden, seen_as_graph, wants_gradient
from .batch_norm import accept, run_batch_norm
from .op import Call, Norm

# raises torch's ValueError if a channel of a sample has a single value
verify_spatial_size: Callable[[torch.Size], None] = getattr(F, "_verify_spatial_size")  # noqa: B009


class InstanceNormOptions(NamedTuple):
    """groups: the number of channels, 0 if x has none. training: whether to use the input's statistics or the
    running ones."""

    groups: int
    eps: float
    training: bool
    momentum: float
    kind: str = "group_norm"


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
        weight (Tensor, optional): The channels' scales, [C], of any floating dtype. Default: None, for 1.
        bias (Tensor, optional): The channels' shifts, [C], of any floating dtype. Default: None, for 0.
        use_input_stats (bool): Whether to normalize with the statistics of the input. Default: True.
        momentum (float): The weight of the batch in the running statistics. Default: 0.1.
        eps (float): The number that is added to the variance under the root. Default: 1e-5.
        activation: What the same kernels apply after the residual, such as ``"relu"``, ``nn.ReLU()`` or
            ``("leaky_relu", 0.2)``. See :class:`bnfast.Activation`. Keyword only. Default: None.
        residual (Tensor, optional): What is added to the normalized values before the activation, of input's
            shape, dtype and device, in any strides. Keyword only. Default: None.

    Shape:
        - input: (N, C, *), of fp16, bf16, fp32 or fp64, in any strides.
        - residual: as input.
        - output: as input, channels_last or channels_last_3d if input is (torch's is not), else contiguous.

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
        return overridden(instance_norm, locals(), 1)
    if not isinstance(input, Tensor):  # torch's error
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    activation = None if activation is None else Activation.of(activation)
    channels = input.shape[1] if input.dim() > 1 else 0
    if type(momentum) is not float or type(eps) is not float or type(use_input_stats) is not bool:
        momentum, eps = _as_torch_takes_them(use_input_stats, momentum, eps)
    options = new(InstanceNormOptions, (channels, eps, use_input_stats, momentum, "group_norm"))
    buffers = (running_mean, running_var, None)
    call = new(Call, (input, weight, bias, residual, activation, options, buffers))
    # torch's batch_norm refuses a negative eps, and its instance_norm does not
    if not use_input_stats and running_mean is not None and eps >= 0.0:
        route = choose_route(input)
        x = None if route == TORCH else accept(route, call, format_in_instance_norm)
        # torch's batch_norm, to which the kernels may leave the call, would save inference tensors
        if x is not None and (
            route != KERNELS
            or torch.is_inference_mode_enabled()
            or not any(t is not None and t.is_inference() for t in (running_mean, running_var))
        ):
            return run_batch_norm(call._replace(x=x, options=BatchNormOptions(False, momentum, eps)))
    return op.run(call, NORM)


def _as_torch_takes_them(use_input_stats: Any, momentum: Any, eps: Any) -> tuple[float, float]:
    """Floats of the integers and 0-d tensors that F.instance_norm accepts for floats, or its TypeError."""
    x = torch.ones(1, 1, 2)
    F.instance_norm(x, x[0, :, 0], x[0, :, 1], None, None, use_input_stats, momentum, eps)
    return float(momentum), float(eps)


def _accept(route: int, call: Call) -> Tensor | None:
    x, (channels, _, training, _, _) = call.x, call.options
    # without channels, and with one value each, torch raises its errors
    if not training or channels <= 0 or x.numel() == x.shape[0] * channels:
        return None
    return accept(route, call, format_in_instance_norm)


def _update(call: Call, route: int) -> None:
    mean, variance, _ = call.buffers
    if mean is not None and variance is not None:
        _track(call.x.detach(), mean, variance, call.options.momentum)


@torch.no_grad()
def _track(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    """Updates the running statistics, in plain torch, which reads x once more: the kernels return 1 /
    sqrt(variance + eps), from which a variance far below eps cannot be recovered. Half precision is copied to
    fp32, since torch would round the moments to x's dtype."""
    variance, mean = torch.var_mean(wide(x), list(range(2, x.dim())), correction=1)
    for running, statistic in ((running_mean, mean.mean(0)), (running_var, variance.mean(0))):
        old = running.to(torch.promote_types(running.dtype, statistic.dtype))
        running.copy_((1 - momentum) * old + momentum * statistic)


def _torch(call: Call) -> Tensor:
    """F.instance_norm, with the dtype and memory format that the kernels' result has."""
    x, weight, bias, (mean, variance, _) = call.x, call.weight, call.bias, call.buffers
    _, eps, use_input_stats, momentum, _ = call.options
    refuse_dtensor(x, mean, variance, weight, bias)
    given, weight, bias = in_float(x, weight, bias)
    rest = (mean, variance, weight, bias, use_input_stats, momentum, eps)
    if x.dim() > 3 and (wants_gradient(x, weight, bias) or seen_as_graph()):
        if use_input_stats:
            verify_spatial_size(x.size())
        y = F.instance_norm(flat(given), *rest).view_as(x)
    else:
        y = F.instance_norm(given, *rest)
    return in_format_of(x, y if given is x else y.to(x.dtype), format_in_instance_norm)


NORM = Norm(
    _accept, _torch, group_norm.NORM.kernels, group_norm.NORM.reference,
    group_norm.NORM.reference_backward, group_norm.GroupNorm, _update,
)  # fmt: skip
