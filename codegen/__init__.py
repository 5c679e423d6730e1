"""What guards code generation: kernels are compiled without a GPU, what a layer launches is recorded, and the
machine code is read. `python3 -m codegen` holds what they take against budgets.csv."""

from __future__ import annotations

from bnfast import dispatch

SMS = 132  # multiprocessors of an H200, for which grids are planned and bytes in flight counted


def why_not_compiled() -> str | None:
    """Why this process cannot compile kernels; None where it can. What is compiled needs Triton imported."""
    if not dispatch.TRITON:
        found = (
            f"Triton {dispatch.TRITON_VERSION} is too old"
            if dispatch.TRITON_VERSION
            else "there is no Triton"
        )
        return f"no registers, no bytes in flight: {found}"
    if dispatch.INTERPRET:
        return "no registers, no bytes in flight: under TRITON_INTERPRET kernels are not compiled"
    return None
