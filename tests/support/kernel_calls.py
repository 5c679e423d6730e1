"""The kernels' host functions as the tests call them: the one place that knows the order of their arguments.

Each forward returns (y, table, signs or None), and each backward (dx, dweight, dbias, dz)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bnfast.checks.cases import Case
from bnfast.kernels import batch_norm as _batch_norm
from bnfast.kernels import group_norm as _group_norm
from bnfast.kernels import launch, plan
from bnfast.kernels import layer_norm as _layer_norm
from bnfast.kernels.epilogue import NO_EPILOGUE, Epilogue
from bnfast.kernels.records import (
    NO_BUFFERS,
    BatchNormOptions,
    Forward,
    Gradients,
    GroupNormOptions,
    LayerNormOptions,
    Renorm,
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
RENORM = Renorm(3.0, 5.0)


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


def layer_norm(x: Tensor, weight: Result, bias: Result, *, keep: bool = True) -> Forward:
    """Of the last dimension."""
    options = LayerNormOptions(x.shape[-1:], EPS)
    return _layer_norm.forward(x, weight, bias, NO_BUFFERS, options, keep=keep)


def layer_norm_backward(
    x: Tensor, dy: Tensor, table: Tensor, weight: Result, wanted: Wanted = ALL
) -> Gradients:
    return _layer_norm.backward(x, dy, table, weight, None, LayerNormOptions(x.shape[-1:], EPS), wanted)


def step(
    case: Case, x: Tensor, dy: Tensor, weight: Result, bias: Result, wanted: Wanted = ALL
) -> dict[str, Tensor]:
    """All that a case's forward and backward give: y, table, the gradients that are wanted, and the running
    statistics of a BatchNorm that tracks them."""
    state: dict[str, Tensor] = {}
    if case.layer == "BatchNorm":
        if case.tracked:
            state = {"mean": torch.zeros(case.channels), "variance": torch.ones(case.channels)}
        y, table, _ = batch_norm_train(x, weight, bias, *state.values())
        found = batch_norm_backward(x, dy, table, wanted)
    elif case.layer == "LayerNorm":
        y, table, _ = layer_norm(x, weight, bias)
        found = layer_norm_backward(x, dy, table, weight, wanted)
    else:
        y, table, _ = group_norm(x, case.in_sample, weight, bias)
        found = group_norm_backward(x, dy, table, case.in_sample, weight, wanted)
    *gradients, dz = found
    assert dz is None
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient is not None) == bool(want)
    named = {"y": y, "table": table, **dict(zip(("dx", "dweight", "dbias"), gradients, strict=True)), **state}
    return {name: t for name, t in named.items() if t is not None}


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
