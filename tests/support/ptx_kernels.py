"""Small kernels in PTX, written for tests of what executes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bnfast.ptx.execute import MADE, READ_ONLY, Arguments, Execution, Grid, run
from bnfast.ptx.program import Program

LANES = 32


def kernel(body: str, parameters: int, threads: int = LANES) -> Program:
    """A kernel whose 64-bit parameters are in %rd0, %rd1 and so on, and %tid.x in %r0."""
    loads = "\n".join(f"ld.param.b64 %rd{k}, [k_param_{k}];" for k in range(parameters))
    return Program(
        f".visible .entry k()\n.reqntid {threads}\n{{\n{loads}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def launch(
    program: Program,
    *arrays: np.ndarray,
    kinds: Sequence[int] | None = None,
    grid: int | Grid = 1,
    shared: int = 0,
    seed: int = 1,
    resident: int = 8,
    perturb: int = 0,
    after: Sequence[Execution] | None = None,
) -> Execution:
    """Runs it on numpy's arrays. kinds: what it may do with each; if not given, it makes the last."""
    arguments = Arguments()
    for k, array in enumerate(arrays):
        kind = kinds[k] if kinds else MADE if k == len(arrays) - 1 else READ_ONLY
        arguments.parameters.append(array.ctypes.data)
        arguments.watch(f"array{k}", array.ctypes.data, array.nbytes, array.itemsize, kind)
    return run(program, "k", grid, shared, arguments, seed, resident=resident, perturb=perturb, after=after)
