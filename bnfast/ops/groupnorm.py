"""GroupNorm's operators, for everything that looks at graphs: torch.ops.bnfast.group_norm_*. InstanceNorm has
as many groups as channels. See batchnorm.py on why they hold no autograd, and workspaces of their own."""

from __future__ import annotations

from ..kernels import group_norm as kernels
from ..kernels import layouts
from .followed import BACKWARD, FORWARD, define, epilogue, gradients_like, present, signs_like, with_signs


def _forward(  # type: ignore[no-untyped-def]
    x, groups, weight, bias, eps, activation="none", parameter=0.0, residual=None, signs=False
):
    after = epilogue(activation, parameter, residual, signs)
    return with_signs(kernels.forward(layouts.ordered(x), groups, weight, bias, eps, True, after))


def _backward(  # type: ignore[no-untyped-def]
    x, dy, table, weight, groups, need_dx, weight_dtype, bias_dtype, bias=None, activation="none",
    parameter=0.0, kept=None,
):  # fmt: skip
    after, wanted = epilogue(activation, parameter, kept), (need_dx, weight_dtype, bias_dtype)
    return present(x, kernels.backward(x, dy, table, weight, groups, *wanted, True, bias, after))


def _forward_fake(  # type: ignore[no-untyped-def]
    x, groups, weight, bias, eps, activation="none", parameter=0.0, residual=None, signs=False
):
    table = x.new_empty((2, x.shape[0] * groups), dtype=layouts.accumulator(x))
    y = layouts.ordered_like(x)
    return y, table, signs_like(y, residual, signs)


def _backward_fake(  # type: ignore[no-untyped-def]
    x, dy, table, weight, groups, need_dx, weight_dtype, bias_dtype, bias=None, activation="none",
    parameter=0.0, kept=None,
):  # fmt: skip
    like = layouts.out_like(x)
    return gradients_like(like, x.shape[1], need_dx, weight_dtype, bias_dtype, kept is not None)


forward = define(
    "group_norm_forward(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, "
    f"{FORWARD}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward = define(
    "group_norm_backward(Tensor x, Tensor dy, Tensor table, Tensor? weight, int groups, bool need_dx, "
    "ScalarType? weight_dtype, ScalarType? bias_dtype, Tensor? bias=None, "
    f"{BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
