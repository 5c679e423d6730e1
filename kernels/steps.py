"""Steps: the launches that one call of a layer makes, with all that does not change between calls of one
signature, so that a call is a lookup, a few allocations and the launches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import plan
from .epilogue import IDENTITY
from .group_plan import swept
from .launch import INTERPRET, Launch, current_stream
from .layouts import accumulator, is_channels_last
from .records import Problem


@lru_cache
def multiprocessors(index: int) -> int:
    """SMs to plan for. The interpreter runs programs one after another, so there a few show all there is to
    see.
    """
    if INTERPRET or index < 0:
        return int(os.environ.get("BNFAST_INTERPRETER_SMS", "2"))
    return torch.cuda.get_device_properties(index).multi_processor_count


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def where(x: Tensor) -> tuple[int, int]:
    """(device index, its current stream)."""
    index = x.get_device()
    return index, 0 if INTERPRET or index < 0 else current_stream(index)


@dataclass(frozen=True)
class Step:
    """One or two launches, and what they need allocated."""

    first: Launch
    second: Launch
    seed: Tensor  # empty, of the accumulator's dtype, on x's device: for allocating in less time
    partials: int = 0  # elements of workspace for the first
    counters: int = 0  # of arrivals, for the first


_steps: dict[Any, Any] = {}


def step_for(
    make: Callable[..., Any],
    x: Tensor,
    index: int,
    addresses: int,
    *rest: Any,
    sizes: Callable[[Tensor, int, bool], Any] | None = None,
) -> Any:
    """The step for this signature, from `make(sizes, *rest)` the first time. addresses: of the caller's
    tensors that the kernels load in vectors, or-ed. rest: dtypes and flags that the compiled kernels depend
    on. sizes: how the plans see x; None: as Sizes."""
    aligned = addresses % plan.VECTOR_BYTES == 0
    key = (make, x.shape, x.is_contiguous(), x.dtype, index, aligned, rest)  # x is dense: see layouts.py
    step = _steps.get(key)
    if step is None:
        if len(_steps) >= 8192:  # shapes that never repeat must not fill the host's memory
            _steps.clear()
        step = _steps[key] = make((sizes or Sizes)(x, index, aligned), *rest)
    return step


def forget_plans() -> None:
    """Plan anew from here on: for tests that change what plans depend on."""
    multiprocessors.cache_clear()
    _steps.clear()


class Sizes:
    """What a signature says of x, and the launches that follow from it.

    groups: 0 where a cell is a channel over all samples; else a sample's cells, which are groups of
    channels."""

    def __init__(self, x: Tensor, index: int, aligned: bool) -> None:
        self.aligned, self.groups = aligned, 0
        n, c, *inner = x.shape
        last = is_channels_last(x)
        self.x = Problem(n, c, prod(inner), x.element_size(), last, aligned, multiprocessors(index))
        self.seed = torch.empty(0, dtype=accumulator(x), device=x.device)

    def _sweep(
        self, make: Callable[..., plan.Sweep], inputs: int, by_group: bool, activation: str
    ) -> plan.Sweep:
        if not self.groups:
            return make(self.x, inputs, activation=activation)
        return swept(make, self.x, self.groups, by_group, inputs, activation)

    def mapping(
        self, kernel: Any, inputs: int, tensors: Sequence[str], constants: dict[str, Any], **how: Any
    ) -> Launch:
        """A kernel that maps x element by element. constants, how: as Launch's."""
        sweep = self._sweep(plan.map_sweep, inputs, False, constants["ACT"].name)
        return Launch(kernel, sweep, tensors, constants, self.aligned, **how)

    def reducing(
        self, kernel: Any, inputs: int, tensors: Sequence[str], constants: dict[str, Any],
        then: Launch | None = None, by_group: bool = False, **how: Any,
    ) -> Step:  # fmt: skip
        """A kernel that reduces x, and the launch that follows it. by_group: contiguous groups are runs of
        memory, and reduced as such. constants, how: as Launch's."""
        sweep = self._sweep(plan.reduce_sweep, inputs, by_group, constants.get("ACT", IDENTITY).name)
        first = Launch(kernel, sweep, tensors, constants, self.aligned, **how)
        return Step(first, then or first, self.seed, sweep.partials, sweep.counters)
