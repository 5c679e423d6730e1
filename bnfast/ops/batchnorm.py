"""The operators, for everything that looks at graphs: torch.compile, make_fx, opcheck.
torch.ops.bnfast.batch_norm_*.

Their workspaces are their own: torch.compile's CUDA graphs (reduce-overhead) keep all that is allocated in
their warm-up in a pool, which a cached workspace must not live in.

No autograd here (autograd/ has it): a Function around bare operators costs half of what registered autograd
costs."""

from __future__ import annotations

import torch

from ..kernels import batch_norm as kernels
from ..kernels import layouts
from ..reference.batchrenorm import refuse_recomputation
from .followed import BACKWARD, FORWARD, define, epilogue, gradients_like, present, signs_like, with_signs


def _ordered(x: torch.Tensor) -> torch.Tensor:
    return layouts.ordered(x, layouts.format_in_batch_norm)


def _train(  # type: ignore[no-untyped-def]
    x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps, activation="none",
    parameter=0.0, residual=None, signs=False, renorm=None,
):  # fmt: skip
    after = epilogue(activation, parameter, residual, signs)
    return with_signs(
        kernels.forward(
            _ordered(x), weight, bias, running_mean, running_var, batches, cumulative, momentum, eps,
            True, renorm, after,
        )
    )  # fmt: skip


def _train_renorm(  # type: ignore[no-untyped-def]
    x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps, limits, guarded, *after,
):  # fmt: skip
    refuse_recomputation()
    return _train(
        x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps, *after,
        renorm=(tuple(limits), guarded),
    )  # type: ignore[misc]  # fmt: skip


def _eval(  # type: ignore[no-untyped-def]
    x, weight, bias, running_mean, running_var, eps, keep, activation="none",
    parameter=0.0, residual=None, signs=False,
):  # fmt: skip
    after = epilogue(activation, parameter, residual, signs)
    return with_signs(
        kernels.inference(_ordered(x), weight, bias, running_mean, running_var, eps, keep, after)
    )


def _backward(  # type: ignore[no-untyped-def]
    x, dy, table, training, need_dx, weight_dtype, bias_dtype, activation="none", parameter=0.0, kept=None
):
    after = epilogue(activation, parameter, kept)
    return present(
        x, kernels.backward(x, dy, table, training, need_dx, weight_dtype, bias_dtype, True, after)
    )  # fmt: skip


def _result(
    x: torch.Tensor, rows: int, residual: torch.Tensor | None, signs: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a forward: empty tensors like y, a table of these rows, and signs."""
    y = layouts.ordered_like(x, layouts.format_in_batch_norm)
    table = x.new_empty((rows, x.shape[1]) if rows else (0,), dtype=layouts.accumulator(x))
    return y, table, signs_like(y, residual, signs)


def _train_fake(  # type: ignore[no-untyped-def]
    x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps, activation="none",
    parameter=0.0, residual=None, signs=False,
):  # fmt: skip
    return _result(x, 4, residual, signs)


def _train_renorm_fake(  # type: ignore[no-untyped-def]
    x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps, limits, guarded,
    activation="none",
    parameter=0.0, residual=None, signs=False,
):  # fmt: skip
    return _result(x, 6, residual, signs)


def _eval_fake(  # type: ignore[no-untyped-def]
    x, weight, bias, running_mean, running_var, eps, keep, activation="none",
    parameter=0.0, residual=None, signs=False,
):  # fmt: skip
    return _result(x, 4 if keep else 0, residual, signs)


def _backward_fake(  # type: ignore[no-untyped-def]
    x, dy, table, training, need_dx, weight_dtype, bias_dtype, activation="none", parameter=0.0, kept=None
):
    like = layouts.out_like(x)
    return gradients_like(like, x.shape[1], need_dx, weight_dtype, bias_dtype, kept is not None)


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
    "batch_norm_backward(Tensor x, Tensor dy, Tensor table, bool training, bool need_dx, "
    f"ScalarType? weight_dtype, ScalarType? bias_dtype, {BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
