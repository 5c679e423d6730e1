"""What guards code generation: kernels are compiled without a GPU, what a layer launches is recorded, and the
machine code is read. `python3 -m codegen` holds what they take against budgets.csv."""

from __future__ import annotations

import torch

from bnfast import dispatch

SMS = 132  # multiprocessors of an H200, for which grids are planned and bytes in flight counted


def why_not_compiled() -> str | None:
    """Why this process cannot compile kernels; None where it can. What is compiled needs Triton imported."""
    if not dispatch.TRITON:
        why = dispatch.reason_for_torch(torch.empty(0))
    else:
        from bnfast.kernels.launch import INTERPRET  # needs Triton

        why = "under TRITON_INTERPRET kernels are not compiled" if INTERPRET else None
    return why and f"bytes and launches alone: {why}"


def why_not_counted() -> str | None:
    """Why this process cannot count what compiled kernels do, which needs a C compiler too; None where it
    can."""
    if why_not := why_not_compiled():
        return why_not
    from bnfast.ptx import library

    try:
        library.load()
    except library.MissingCompiler as missing:
        return f"bytes and launches alone: {str(missing).splitlines()[0]}"
    return None
