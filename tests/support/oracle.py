"""One step of a case's layer against fp64, on any device. bnfast.checks has the cases and what they expect,
bnfast.exact the rule."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from math import prod

import pytest
import torch

import bnfast
from bnfast.checks import fp64, one_step
from bnfast.checks.cases import Case, given
from bnfast.dispatch import INTERPRET
from tests.support.buffers import assert_same_bits, guarded, nan_filled_allocations


def unfit() -> str | None:
    """Why the tests that are marked gpu cannot run here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return "needs compiled kernels: unset TRITON_INTERPRET" if INTERPRET else None


def need_memory(size: float) -> None:
    """Skips a test that needs so many bytes where the GPU has not as many free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 1e9:.0f} GB of GPU memory, and {free / 1e9:.0f} are free")


def check(case: Case, device: torch.device) -> None:
    """The step is right, looks as torch's does, and leaves its inputs alone."""
    if device.type == "cuda":
        need_memory(24 * prod(case.shape) * 8)  # the fp64 results, their terms and their scales
    tensors = given(case, device)
    held = {name: guarded(t) for name, t in tensors.tensors().items() if 0 not in t.stride()}
    tensors = replace(tensors, **{name: h.tensor for name, h in held.items()})
    before = {name: t.clone() for name, t in tensors.tensors().items()}
    with nan_filled_allocations():  # what a kernel forgets to write, or reads beside its tensors, is NaN
        ours = one_step.run(case, bnfast, tensors)
    assert_same_bits(tensors.tensors(), before, "was written to")
    assert [name for name, h in held.items() if not h.intact()] == [], "written to beside these"
    verdicts = fp64.judge(case, tensors, ours)
    problems = [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.ok]
    assert not problems, "; ".join(problems)
    if case.storage in ("dense", "offset"):
        strides = tensors.x.stride()
        assert (ours["y"].stride(), ours["dx"].stride()) == (strides, strides), "x has another memory format"


def compile_for(cases: list[Case]) -> None:
    """Run steps whose results nobody looks at: it compiles their kernels. What fails is left to the tests."""
    for case in cases:
        with contextlib.suppress(Exception):
            one_step.run(case, bnfast, given(case, torch.device("cuda")))
