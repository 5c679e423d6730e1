"""The operators, for everything that looks at graphs: torch.compile, make_fx, opcheck.
torch.ops.bnfast.batch_norm_*.

Their workspaces are their own: torch.compile's CUDA graphs (reduce-overhead) keep all that is allocated in
their warm-up in a pool, which a cached workspace must not live in.

No autograd here (autograd.py has it): a Function around bare operators costs half of what registered
autograd costs."""

from __future__ import annotations

import torch

from ..kernels import batch_norm as kernels
from ..kernels import layouts

_library = torch.library.Library("bnfast", "DEF")
_library.define(
    "batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? batches, bool cumulative, float momentum, float eps)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "batch_renorm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, "
    "Tensor(b!) running_var, Tensor(c!)? batches, bool cumulative, float momentum, float eps, "
    "float[] limits, bool guarded) -> (Tensor, Tensor)"
)
_library.define(
    "batch_norm_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
    "float eps, bool keep) -> (Tensor, Tensor)"
)
_library.define(
    "batch_norm_backward(Tensor x, Tensor dy, Tensor table, bool training, bool need_dx, "
    "ScalarType? weight_dtype, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)"
)
train = torch.ops.bnfast.batch_norm_train.default
train_renorm = torch.ops.bnfast.batch_renorm_train.default
evaluate = torch.ops.bnfast.batch_norm_eval.default
backward = torch.ops.bnfast.batch_norm_backward.default


def _train(x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps):  # type: ignore[no-untyped-def]
    return kernels.forward(
        layouts.dense(x),
        weight,
        bias,
        running_mean,
        running_var,
        batches,
        cumulative,
        momentum,
        eps,
        own=True,
    )


def _train_renorm(  # type: ignore[no-untyped-def]
    x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps, limits, guarded
):  # fmt: skip
    return kernels.forward(
        layouts.dense(x), weight, bias, running_mean, running_var, batches, cumulative, momentum, eps,
        own=True, renorm=(tuple(limits), guarded),
    )  # fmt: skip


def _eval(x, weight, bias, running_mean, running_var, eps, keep):  # type: ignore[no-untyped-def]
    return kernels.inference(layouts.dense(x), weight, bias, running_mean, running_var, eps, keep)


def _backward(x, dy, table, training, need_dx, weight_dtype, bias_dtype):  # type: ignore[no-untyped-def]
    gradients = kernels.backward(x, dy, table, training, need_dx, weight_dtype, bias_dtype, own=True)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _table_like(x: torch.Tensor, rows: int) -> torch.Tensor:
    size = (rows, x.shape[1]) if rows else (0,)
    return x.new_empty(size, dtype=layouts.accumulator(x))


def _train_fake(x, weight, bias, running_mean, running_var, batches, cumulative, momentum, eps):  # type: ignore[no-untyped-def]
    return layouts.out_like(x), _table_like(x, 4)


def _train_renorm_fake(x, *_):  # type: ignore[no-untyped-def]
    return layouts.out_like(x), _table_like(x, 6)


def _eval_fake(x, weight, bias, running_mean, running_var, eps, keep):  # type: ignore[no-untyped-def]
    return layouts.out_like(x), _table_like(x, 4 if keep else 0)


def _backward_fake(x, dy, table, training, need_dx, weight_dtype, bias_dtype):  # type: ignore[no-untyped-def]
    return (
        layouts.out_like(x) if need_dx else x.new_empty(0),
        x.new_empty(0) if weight_dtype is None else x.new_empty(x.shape[1], dtype=weight_dtype),
        x.new_empty(0) if bias_dtype is None else x.new_empty(x.shape[1], dtype=bias_dtype),
    )


for _name, _real, _fake in (
    ("batch_norm_train", _train, _train_fake),
    ("batch_renorm_train", _train_renorm, _train_renorm_fake),
    ("batch_norm_eval", _eval, _eval_fake),
    ("batch_norm_backward", _backward, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"bnfast::{_name}", _fake, lib=_library)
