"""Who is timed: bnfast, and everybody who computes the same."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.baselines import cudnn, cudnn_frontend, libraries, pytorch
from benchmarks.baselines.contender import Baseline

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline for baseline in (*pytorch.ALL, *cudnn.ALL, *cudnn_frontend.ALL, *libraries.ALL)
}


def get(names: Sequence[str]) -> list[Baseline]:
    """By name, in this order. ValueError for a name that nobody has."""
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(f"names must be of {', '.join(BASELINES)}, got {', '.join(unknown)}")
    return [BASELINES[name] for name in names]
