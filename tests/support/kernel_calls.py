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

EPS = 1e-5
Result = Tensor | None
Forward = tuple[Tensor, Tensor, Result]
Gradients = tuple[Result, Result, Result, Result]
# Whether dx is wanted, and the dtypes of dweight and dbias, or None where they are not wanted.
Wanted = tuple[bool, torch.dtype | None, torch.dtype | None]
ALL: Wanted = (True, torch.float32, torch.float32)
RENORM = ((3.0, 5.0, 0.0, 0.0, 0.0), True)  # r_max, d_max and their schedule; whether infinities are skipped


def batch_norm_train(
    x: Tensor, weight: Result = None, bias: Result = None, mean: Result = None, variance: Result = None,
    batches: Result = None, *, momentum: float = 0.1, renorm: Any = None, epilogue: Epilogue = NO_EPILOGUE,
) -> Forward:  # fmt: skip
    state = (x, weight, bias, mean, variance, batches)
    return _batch_norm.forward(*state, False, momentum, EPS, renorm=renorm, epilogue=epilogue)


def batch_norm_eval(x: Tensor, mean: Tensor, variance: Tensor, *, keep: bool = True) -> Forward:
    return _batch_norm.inference(x, None, None, mean, variance, EPS, keep)


def batch_norm_backward(
    x: Tensor, dy: Tensor, table: Tensor, wanted: Wanted = ALL, *, training: bool = True,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Gradients:  # fmt: skip
    return _batch_norm.backward(x, dy, table, training, *wanted, epilogue=epilogue)


def group_norm(
    x: Tensor, groups: int, weight: Result, bias: Result, epilogue: Epilogue = NO_EPILOGUE
) -> Forward:
    return _group_norm.forward(x, groups, weight, bias, EPS, epilogue=epilogue)


def group_norm_backward(
    x: Tensor, dy: Tensor, table: Tensor, groups: int, weight: Result, wanted: Wanted = ALL,
    *, bias: Result = None, epilogue: Epilogue = NO_EPILOGUE,
) -> Gradients:  # fmt: skip
    return _group_norm.backward(x, dy, table, weight, groups, *wanted, bias=bias, epilogue=epilogue)


def layer_norm(x: Tensor, weight: Result, bias: Result, *, keep: bool = True) -> Forward:
    """Of the last dimension."""
    return _layer_norm.forward(x, weight, bias, 1, EPS, keep)


def layer_norm_backward(
    x: Tensor, dy: Tensor, table: Tensor, weight: Result, wanted: Wanted = ALL
) -> Gradients:
    return _layer_norm.backward(x, dy, weight, table, 1, *wanted)


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


_HOSTS: dict[str, Any] = {"batch": _batch_norm, "group": _group_norm, "layer": _layer_norm}
_FIRST_WANTED = {"batch": 4, "group": 5, "layer": 5}  # the position of need_dx among a backward's arguments


@contextlib.contextmanager
def gradients_asked_for(norm: str) -> Iterator[list[tuple[bool, bool, bool]]]:
    """Grows by whether (dx, dweight, dbias) are wanted with each call of the backward."""
    host, first = _HOSTS[norm], _FIRST_WANTED[norm]
    seen: list[tuple[bool, bool, bool]] = []
    backward = host.backward

    def noted(*args: Any) -> Any:
        need_dx, weight_dtype, bias_dtype = args[first : first + 3]
        seen.append((need_dx, weight_dtype is not None, bias_dtype is not None))
        return backward(*args)

    with mock.patch.object(host, "backward", noted):
        yield seen


@contextlib.contextmanager
def refusing(norm: str, name: str) -> Iterator[None]:
    """The forward or the backward of a norm finds all sizes too large."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise plan.TooLarge("as sizes beyond 32 bits would be")

    with mock.patch.object(_HOSTS[norm], name, refuse):
        yield


def workspaces_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by whether a workspace of its own is wanted with each call of BatchNorm that takes one."""
    seen: list[bool] = []

    def workspace(*args: Any) -> Any:
        seen.append(args[-1])
        return launch.workspace(*args)

    monkeypatch.setattr(_batch_norm, "workspace", workspace)
    return seen
