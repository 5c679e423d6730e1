"""Families of cases: what every layer is put through, from one example of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from bnfast.checks.cases import Case

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (FP16, BF16, FP32, FP64)


def parameters(groups: dict[str, Iterable[Case]]) -> list[Any]:
    """For pytest.mark.parametrize: all of these cases, each named by its group."""
    return [pytest.param(case, id=f"{name}-{case}") for name, cases in groups.items() for case in cases]


def on_gpu(cases: Iterable[Case]) -> list[Any]:
    """For pytest.mark.parametrize: cases whose `device` is the GPU."""
    return [pytest.param(case, marks=pytest.mark.gpu) for case in cases]


def varied(cases: Iterable[Case], *changes: dict[str, Any]) -> list[Case]:
    return [replace(case, **change) for case, change in itertools.product(cases, changes)]


def layouts(*cases: Case) -> list[Case]:
    """Contiguous, and channels_last where there is such a thing."""
    return [
        replace(case, channels_last=last)
        for case in cases
        for last in ((False, True) if len(case.shape) > 3 else (False,))
    ]


def in_dtypes(cases: Iterable[Case], dtypes: Sequence[torch.dtype] = DTYPES) -> list[Case]:
    return varied(cases, *({"dtype": dtype} for dtype in dtypes))


def strides(case: Case) -> list[Case]:
    """x where a kernel would not like it, and gradients as autograd makes them: y.sum(), y.t(), cat."""
    storages = ({"storage": how} for how in ("offset", "sliced"))
    gradients = ({"gradient": how} for how in ("expanded", "transposed", "sliced", "offset"))
    changed = varied(layouts(case), *storages, *gradients)
    return [*in_dtypes(changed, (BF16, FP32)), replace(case, storage="transposed")]


def far_means(case: Case) -> list[Case]:
    """Means as many deviations from zero as the dtype can tell apart."""
    means = ((FP16, 100.0), (BF16, 100.0), (FP32, 1e4), (FP32, -1e4), (FP64, 1e4))
    return varied(layouts(case), *({"dtype": dtype, "mean": mean} for dtype, mean in means))


def lacking(case: Case) -> list[Case]:
    """Without some of the parameters, or with them in x's type, and an eps that cannot be overlooked."""
    changes = ({"affine": False}, {"bias": False}, {"parameters": BF16}, {"eps": 0.1})
    return varied(layouts(replace(case, dtype=BF16)), *changes)
