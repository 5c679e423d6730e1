"""CUDA graphs: work captured once, to be replayed with nothing of the host in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def captured(work: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `work`, which has run before, and what it returned. pool: memory to share with others.

    What `work` raises comes as it is, and leaves the current stream what it was. torch does neither: an error
    of its own at the end of a failed capture hides the reason, and leaves the capture's stream current."""
    graph, reasons = torch.cuda.CUDAGraph(), list[Exception]()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            try:
                return graph, work()
            except Exception as error:
                reasons.append(error)
                raise
    except Exception as error:
        raise (reasons.pop() if reasons else error) from None
