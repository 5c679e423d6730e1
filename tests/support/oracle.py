"""One step of a case's layer against fp64, on any device. bnfast.checks has the cases and the truth,
bnfast.exact the rule."""

from __future__ import annotations

import torch

import bnfast
from bnfast.checks import one_step, truth
from bnfast.checks.cases import Case, given
from tests.support.buffers import bit_identical, nan_filled_allocations


def check(case: Case, device: torch.device) -> None:
    """The step is right, looks as torch's does, and leaves its inputs alone."""
    with nan_filled_allocations():  # what a kernel forgets to write, or reads beside its tensors, is NaN
        tensors = given(case, device)
        before = {name: t.clone() for name, t in tensors.tensors().items()}
        ours = one_step.run(case, bnfast, tensors)
    for name, t in tensors.tensors().items():
        assert bit_identical(t, before[name]), f"{name} was written to"
    verdicts = truth.judge(case, tensors, ours)
    problems = [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.ok]
    assert not problems, "; ".join(problems)
    if case.storage in ("dense", "offset"):
        strides = tensors.x.stride()
        assert (ours["y"].stride(), ours["dx"].stride()) == (strides, strides), "x has another memory format"
