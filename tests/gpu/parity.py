"""What the GPU tests share: a check of one case (bnfast.checks has the cases and the truth, bnfast.exact the
rule)."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

import bnfast
from bnfast import exact
from bnfast.checks import cases, one_step
from bnfast.checks.cases import Case, Given
from bnfast.dispatch import INTERPRET
from tests.support import oracle


def device() -> torch.device:
    return torch.device("cuda")


def unfit() -> str | None:
    """Why these tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return "needs compiled kernels: unset TRITON_INTERPRET" if INTERPRET else None


def given(case: Case) -> Given:
    return cases.given(case, device())


def excess(case: Case, value: Tensor, expected: exact.Value) -> float:
    return exact.excess(value, expected, exact.accumulator(case.dtype))


def check(case: Case) -> None:
    oracle.check(case, device())


def compile_for(cases: list[Case]) -> None:
    """Run steps whose results nobody looks at: it compiles their kernels. What fails is left to the tests."""
    for case in cases:
        with contextlib.suppress(Exception):
            one_step.run(case, bnfast, given(case))
