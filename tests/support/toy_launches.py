"""Triton kernels that no layer launches, compiled and executed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bnfast.ptx import Execution, execute
from bnfast.ptx.driver import fake_driver


class Executed:
    """In the place of a Triton kernel: `Executed(kernel)[(programs,)](...)` executes it, and gives the
    Execution."""

    def __init__(self, kernel: Any, seeds: Sequence[int] = (1, 2, 3)) -> None:
        self.kernel, self.seeds = kernel, seeds
        self.launched: list[Execution] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Execution]:
        def launch(*arguments: Any, **options: Any) -> Execution:
            with fake_driver():
                code = self.kernel[grid](*arguments, **options)
            given = dict(zip(self.kernel.arg_names, arguments, strict=False))
            self.launched.append(
                execute._execute(self.kernel.__name__, code, *grid, given, self.seeds, 0, ())
            )
            return self.launched[-1]

        return launch
