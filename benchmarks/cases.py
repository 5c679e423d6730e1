"""The layers of a network as cases, and as the columns of records."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from benchmarks.suites import Network
from codegen.cases import NAMES, Case


def of_network(suite: str, network: Network, dtype: torch.dtype, channels_last: bool) -> list[Case]:
    """A case for each different layer of a network, in the order in which they first occur."""
    return [
        Case(
            network.norm, (network.batch, shape.channels, *shape.size), network.groups_of(shape), dtype,
            channels_last, shape.activation, shape.residual, count, suite, network.name,
        )
        for shape, count in Counter(network.layers).items()
    ]  # fmt: skip


def columns(case: Case) -> dict[str, Any]:
    """Those of a Record that say which case it is of."""
    return {
        "kind": "layer", "suite": case.suite, "network": case.network, "norm": case.norm,
        "groups": case.groups or None, "shape": "x".join(map(str, case.shape)), "dtype": NAMES[case.dtype],
        "layout": case.layout, "activation": case.activation or "", "residual": int(case.residual),
        "count": case.count,
    }  # fmt: skip
