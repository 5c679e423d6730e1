"""Kernels compiled once for all tests that look at the same code."""

from __future__ import annotations

import functools
from typing import Any

from codegen.sass import Report, compile_kernel

_calls: dict[tuple[object, ...], Any] = {}


@functools.cache
def _compiled(variant: tuple[object, ...], target: str) -> Report:
    c = _calls[variant]
    amd = target == "gfx942"  # warps of 64 threads, no register limit to ask for
    return compile_kernel(
        c.kernel,
        c.signature,
        c.constexprs,
        aligned=c.aligned,
        target=target,
        num_warps=max(1, c.sweep.warps // (2 if amd else 1)),
        **({} if amd else {"maxnreg": c.sweep.registers}),
    )


def compiled(c: Any, target: str = "sm_90") -> Report:
    """c: a Call of kernel_cases.py or row_cases.py. Calls of the same variant are the same code."""
    _calls[c.variant] = c
    return _compiled(c.variant, target)
