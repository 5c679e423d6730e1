"""Launch plans: the launches that one call of a layer makes, with everything that does not change between
calls of one signature, so that a call is a lookup, a few allocations and the launches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .epilogue import IDENTITY
from .group_plan import two_pass
from .launch import INTERPRET, Launch, current_stream
from .layouts import accumulator, is_channels_last
from .plan import PassPlan, plan_elementwise, plan_reduction
from .records import Problem
from .views import VECTOR_BYTES


@lru_cache
def multiprocessors(index: int) -> int:
    """The number of SMs to plan for. The interpreter runs programs one after another, so a few are enough
    there."""
    if INTERPRET or index < 0:
        return int(os.environ.get("BNFAST_INTERPRETER_SMS", "2"))
    return torch.cuda.get_device_properties(index).multi_processor_count


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def device_and_stream(x: Tensor) -> tuple[int, int]:
    """The index of x's device, and that device's current stream."""
    index = x.get_device()
    return index, 0 if INTERPRET or index < 0 else current_stream(index)


@dataclass(frozen=True)
class LaunchPlan:
    """The one or two launches of a call, and the sizes of the workspace that they need."""

    first: Launch
    second: Launch | None
    acc_like: Tensor  # empty, of the accumulator's dtype, on x's device; its new_empty is the quickest
    columns: int  # of stats: the channels, or the groups of all samples
    partials: int = 0  # elements that the first launch needs
    semaphores: int = 0  # counters that the first launch needs


_plans: dict[Any, Any] = {}


def launch_plan(
    make: Callable[..., Any],
    x: Tensor,
    index: int,
    addresses: int,
    *rest: Any,
    signature: Callable[[Tensor, int, bool], Any] | None = None,
) -> Any:
    """The launch plan of this signature. The first time, make(signature, *rest) makes it.

    addresses: those of the caller's tensors that the kernels load in vectors, combined with |. rest: the
    dtypes and flags that the compiled kernels depend on. signature: the class that x is described by;
    None: Signature."""
    aligned = addresses % VECTOR_BYTES == 0
    key = (make, x.shape, x.is_contiguous(), x.dtype, index, aligned, rest)  # x is dense: see layouts.py
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 8192:  # shapes that never repeat must not fill the host's memory
            _plans.clear()
        plan = _plans[key] = make((signature or Signature)(x, index, aligned), *rest)
    return plan


def forget_plans() -> None:
    """Clears the caches of plans, for tests that change what plans depend on."""
    multiprocessors.cache_clear()
    _plans.clear()


class Signature:
    """Shape, dtype and layout of x, from which launches are made.

    groups: 0 where statistics are of a channel over all samples; else the number of groups of channels that
    each sample has."""

    def __init__(self, x: Tensor, index: int, aligned: bool) -> None:
        self.aligned, self.groups = aligned, 0
        n, c, *inner = x.shape
        last = is_channels_last(x)
        self.x = Problem(n, c, prod(inner), x.element_size(), last, aligned, multiprocessors(index))
        self.acc_like = torch.empty(0, dtype=accumulator(x), device=x.device)

    @property
    def columns(self) -> int:
        return self.x.n * self.groups or self.x.c

    def _pass(self, make: Callable[..., PassPlan], inputs: int, by_group: bool, activation: str) -> PassPlan:
        if not self.groups:
            return make(self.x, inputs, activation=activation)
        return two_pass(make, self.x, self.groups, by_group, inputs, activation)

    def elementwise(
        self, kernel: Any, inputs: int, tensors: Sequence[str], constants: dict[str, Any], **how: Any
    ) -> Launch:
        """The launch of an elementwise kernel. constants, how: as Launch's."""
        plan = self._pass(plan_elementwise, inputs, False, constants["ACT"].name)
        return Launch(kernel, plan, tensors, constants, self.aligned, **how)

    def reduction(
        self, kernel: Any, inputs: int, tensors: Sequence[str], constants: dict[str, Any],
        then: Launch | None = None, by_group: bool = False, **how: Any,
    ) -> LaunchPlan:  # fmt: skip
        """The launch of a kernel that reduces x, and `then`, the launch that follows it. by_group: a
        contiguous group is reduced as one run of memory. constants, how: as Launch's."""
        plan = self._pass(plan_reduction, inputs, by_group, constants.get("ACT", IDENTITY).name)
        first = Launch(kernel, plan, tensors, constants, self.aligned, **how)
        return LaunchPlan(first, then, self.acc_like, self.columns, plan.partials, plan.semaphores)
