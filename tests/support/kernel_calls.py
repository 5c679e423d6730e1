"""The kernels' host functions as the tests call them: the one place that knows the order of their arguments.

Each forward returns (y, table, mask or None), and each backward (dx, dweight, dbias, dz)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bnfast.kernels import batch_norm as _batch_norm
from bnfast.kernels import group_norm as _group_norm
from bnfast.kernels import launch, plan
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

EPS = 1e-5
Result = Tensor | None
ALL = Wanted(True, torch.float32, torch.float32)


def batch_norm_train(
    x: Tensor, weight: Result = None, bias: Result = None, mean: Result = None, variance: Result = None,
    batches: Result = None, *, momentum: float = 0.1, renorm: Any = None, epilogue: Epilogue = NO_EPILOGUE,
) -> Forward:  # fmt: skip
    buffers, options = (mean, variance, batches), BatchNormOptions(True, momentum, EPS, renorm)
    return _batch_norm.forward(x, weight, bias, buffers, options, epilogue)


def batch_norm_eval(x: Tensor, mean: Tensor, variance: Tensor, *, keep: bool = True) -> Forward:
    options = BatchNormOptions(False, 0.0, EPS)
    return _batch_norm.forward(x, None, None, (mean, variance, None), options, keep=keep)


def batch_norm_backward(
    x: Tensor, dy: Tensor, table: Tensor, wanted: Wanted = ALL, *, training: bool = True,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Gradients:  # fmt: skip
    options = BatchNormOptions(training, 0.1, EPS)
    return _batch_norm.backward(x, dy, table, None, None, options, wanted, epilogue)


def group_norm(
    x: Tensor, groups: int, weight: Result, bias: Result, epilogue: Epilogue = NO_EPILOGUE
) -> Forward:
    return _group_norm.forward(x, weight, bias, NO_BUFFERS, GroupNormOptions(groups, EPS), epilogue)


def group_norm_backward(
    x: Tensor, dy: Tensor, table: Tensor, groups: int, weight: Result, wanted: Wanted = ALL,
    *, bias: Result = None, epilogue: Epilogue = NO_EPILOGUE,
) -> Gradients:  # fmt: skip
    options = GroupNormOptions(groups, EPS)
    return _group_norm.backward(x, dy, table, weight, bias, options, wanted, epilogue)


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


def workspaces_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by whether a workspace of its own is wanted with each call of BatchNorm that takes one."""
    seen: list[bool] = []

    def workspace(*args: Any) -> Any:
        seen.append(args[-1])
        return launch.workspace(*args)

    monkeypatch.setattr(_batch_norm, "workspace", workspace)
    return seen
