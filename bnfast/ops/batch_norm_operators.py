"""BatchNorm's operators, which are Batch Renormalization's too: torch.ops.bnfast.batch_norm_*."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..kernels import batch_norm as kernels
from ..kernels import layouts
from ..kernels.epilogue import Epilogue
from ..kernels.records import BatchNormOptions, Buffers, Forward, Gradients, Renorm, Wanted
from ..reference.batchrenorm import refuse_recomputation
from .op import Kernels
from .operators import (
    BACKWARD,
    FORWARD,
    WANTED,
    define,
    flat,
    gradients_like,
    mask_like,
    packed,
    present,
    with_mask,
    without_mask,
)

Made = tuple[Tensor, Tensor, Tensor]


class _Train(NamedTuple):
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None
    cumulative: bool
    momentum: float
    eps: float


def _ordered(x: Tensor) -> Tensor:
    return layouts.ordered(x, layouts.format_in_batch_norm)


def _forward(a: _Train, renorm: Renorm | None, epilogue: Epilogue) -> Made:
    momentum = None if a.cumulative else a.momentum
    buffers, options = a[3:6], BatchNormOptions(True, momentum, a.eps, renorm)
    return with_mask(kernels.forward(_ordered(a.x), a.weight, a.bias, buffers, options, epilogue, True, True))


def _train(*given: Any) -> Made:
    return _forward(_Train(*given[:9]), None, packed(*given[9:]))


def _train_renorm(*given: Any) -> Made:
    refuse_recomputation()
    limits, guarded = given[9:11]
    return _forward(_Train(*given[:9]), Renorm(*limits)._replace(guarded=guarded), packed(*given[11:]))


def _eval(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, variance: Tensor, eps: float, keep: bool, *after: Any
) -> Made:
    options, buffers = BatchNormOptions(False, 0.0, eps), (mean, variance, None)
    return with_mask(kernels.forward(_ordered(x), weight, bias, buffers, options, packed(*after), keep, True))


def _backward(x: Tensor, dy: Tensor, table: Tensor, training: bool, *rest: Any) -> tuple[Tensor, ...]:
    wanted, options = Wanted(*rest[:3]), BatchNormOptions(training, 0.0, 0.0)
    return present(x, kernels.backward(x, dy, table, None, None, options, wanted, packed(*rest[3:]), True))


def _like(x: Tensor, rows: int, epilogue: Epilogue) -> Made:
    """Of a forward: empty tensors like y, a table of these rows, and the mask."""
    y = layouts.ordered_like(x, layouts.format_in_batch_norm)
    table = x.new_empty((rows, x.shape[1]) if rows else (0,), dtype=layouts.accumulator(x))
    return y, table, mask_like(y, epilogue)


def _train_fake(*given: Any) -> Made:
    return _like(given[0], 4, packed(*given[9:]))


def _train_renorm_fake(*given: Any) -> Made:
    return _like(given[0], 6, packed(*given[11:]))


def _eval_fake(*given: Any) -> Made:
    return _like(given[0], 4 if given[6] else 0, packed(*given[7:]))


def _backward_fake(x: Tensor, dy: Tensor, table: Tensor, training: bool, *rest: Any) -> tuple[Tensor, ...]:
    residual = packed(*rest[3:]).residual is not None
    return gradients_like(layouts.out_like(x), x.shape[1], Wanted(*rest[:3]), residual)


_STATE = "Tensor x, Tensor? weight, Tensor? bias, "
train = define(
    f"batch_norm_train({_STATE}Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, "
    f"bool cumulative, float momentum, float eps, {FORWARD}) -> (Tensor, Tensor, Tensor)",
    _train,
    _train_fake,
)
train_renorm = define(
    f"batch_renorm_train({_STATE}Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? batches, "
    "bool cumulative, float momentum, float eps, float[] limits, bool guarded, "
    f"{FORWARD}) -> (Tensor, Tensor, Tensor)",
    _train_renorm,
    _train_renorm_fake,
)
evaluate = define(
    f"batch_norm_eval({_STATE}Tensor running_mean, Tensor running_var, float eps, bool keep, "
    f"{FORWARD}) -> (Tensor, Tensor, Tensor)",
    _eval,
    _eval_fake,
)
backward = define(
    f"batch_norm_backward(Tensor x, Tensor dy, Tensor table, bool training, {WANTED}, {BACKWARD}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _operator(
    x: Tensor, weight: Any, bias: Any, buffers: Buffers, options: BatchNormOptions, epilogue: Epilogue,
    keep: bool,
) -> Forward:  # fmt: skip
    training, momentum, eps, renorm = options
    after = flat(epilogue)
    if not training:
        return without_mask(evaluate(x, weight, bias, buffers[0], buffers[1], eps, keep, *after))
    how = (*buffers, momentum is None, 0.0 if momentum is None else momentum, eps)
    if renorm is None:
        return without_mask(train(x, weight, bias, *how, *after))
    return without_mask(train_renorm(x, weight, bias, *how, list(renorm[:5]), renorm[5], *after))


def _operator_backward(
    x: Tensor, dy: Tensor, table: Tensor, weight: Any, bias: Any, options: BatchNormOptions, wanted: Wanted,
    epilogue: Epilogue,
) -> Gradients:  # fmt: skip
    after = (*epilogue.activation, epilogue.residual)
    found: Gradients = backward(x, dy, table, options.training, *wanted, *after)
    return found


KERNELS = Kernels(kernels.forward, kernels.backward, _operator, _operator_backward)
