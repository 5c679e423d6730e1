"""What can be timed: an implementation of a case, with parameters of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.stopwatch import nothing
from codegen.cases import Case


@dataclass(frozen=True)
class Contender:
    """forward(x, z) -> y: act(norm(x) + z) in training, with running statistics updated where torch.nn would;
    z is None without a residual. autograd gives its backward, to x, z and `parameters`. ran: who computes, as
    far as can be said without running it. countable: whether its copies can be counted: torch.compile does
    not run under a dispatch mode."""

    ran: str
    forward: Callable[[Tensor, Tensor | None], Tensor]
    parameters: Sequence[Tensor]
    countable: bool = True


@dataclass(frozen=True)
class Baseline:
    """A way to compute cases. unable(case, device): why it cannot take this one here; None if it can. build:
    makes it for a case; it may compile for seconds. about: one line for the reader of a table. afresh: runs
    before anybody is built for a case."""

    name: str
    about: str
    unable: Callable[[Case, torch.device], str | None]
    build: Callable[[Case, torch.device], Contender]
    afresh: Callable[[], object] = nothing


def lacks(module: str) -> str | None:
    """Why a baseline cannot have its package; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as e:  # a package built for another torch fails in many ways
        return f"{module} cannot be imported here: {type(e).__name__}"
    return None
