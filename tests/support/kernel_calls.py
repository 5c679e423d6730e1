"""The kernels' host functions as the tests call them: the one place that knows the order of their arguments.

Each forward returns (y, stats, mask or None), and each backward (dx, dweight, dbias, dresidual)."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bnfast import kernels
from bnfast.kernels import batch_norm as _batch_norm
from bnfast.kernels import group_norm as _group_norm
from bnfast.kernels import plan
from bnfast.kernels.epilogue import NO_EPILOGUE, Epilogue
from bnfast.kernels.records import (
    NO_BUFFERS,
    BatchNormOptions,
    Forward,
    Gradients,
    GroupNormOptions,
    Wanted,
    new,
)
from bnfast.ops import batch_norm as batch_norm_op
from bnfast.ops import group_norm as group_norm_op
from bnfast.ops import layer_norm as layer_norm_op
from bnfast.ops import op

TRAINING, EVAL = (BatchNormOptions(training, 0.1, 1e-5) for training in (True, False))
Vector = Tensor | None
ALL = Wanted(True, torch.float32, torch.float32)


def kernel_names() -> set[str]:
    """Those of all kernels that there are."""
    modules = pkgutil.iter_modules(kernels.__path__, "bnfast.kernels.")
    defined = {name for module in modules for name in vars(importlib.import_module(module.name))}
    return {name for name in defined if name.endswith("_kernel")}


def batch_norm_train(
    x: Tensor, weight: Vector = None, bias: Vector = None, mean: Vector = None, variance: Vector = None,
    *, epilogue: Epilogue = NO_EPILOGUE,
) -> Forward:  # fmt: skip
    return _batch_norm.forward(x, weight, bias, (mean, variance, None), TRAINING, epilogue)


def batch_norm_eval(x: Tensor, mean: Tensor, variance: Tensor, *, keep: bool = True) -> Forward:
    return _batch_norm.forward(x, None, None, (mean, variance, None), EVAL, keep=keep)


def batch_norm_backward(
    x: Tensor, dy: Tensor, stats: Tensor, wanted: Wanted = ALL, *, epilogue: Epilogue = NO_EPILOGUE
) -> Gradients:
    return _batch_norm.backward(x, dy, stats, None, None, TRAINING, wanted, epilogue)


def group_norm(x: Tensor, groups: int, weight: Vector, bias: Vector, epilogue: Epilogue) -> Forward:
    return _group_norm.forward(x, weight, bias, NO_BUFFERS, GroupNormOptions(groups, 1e-5), epilogue)


def group_norm_backward(
    x: Tensor, dy: Tensor, stats: Tensor, groups: int, weight: Vector, *, bias: Vector, epilogue: Epilogue
) -> Gradients:
    return _group_norm.backward(x, dy, stats, weight, bias, GroupNormOptions(groups, 1e-5), ALL, epilogue)


@contextlib.contextmanager
def gradients_asked_for() -> Iterator[list[tuple[bool, bool, bool]]]:
    """Grows by whether (dx, dweight, dbias) are wanted with each backward."""
    seen: list[tuple[bool, bool, bool]] = []

    def noted(kind: Any, values: Any) -> Any:
        record = new(kind, values)
        if isinstance(record, Wanted):
            seen.append((record.dx, record.weight is not None, record.bias is not None))
        return record

    with mock.patch.object(op, "new", noted):
        yield seen


NORMS = {"batch": batch_norm_op.NORM, "group": group_norm_op.NORM, "layer": layer_norm_op.NORM}


def refusing(norm: str, name: str) -> contextlib.AbstractContextManager[Any]:
    """Within, the forward or the backward of a norm finds all sizes too large."""
    brought, refuse = NORMS[norm], mock.Mock(side_effect=plan.TooLarge("as sizes beyond 32 bits would be"))
    assert brought.kernels is not None
    return mock.patch.dict(vars(brought), kernels=brought.kernels._replace(**{name: refuse}))
