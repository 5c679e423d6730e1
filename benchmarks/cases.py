"""The cases of the networks whose layers are measured."""

from __future__ import annotations

from collections import Counter

import torch

from benchmarks.suites import Network
from codegen.cases import Case


def of_network(suite: str, network: Network, dtype: torch.dtype, channels_last: bool) -> list[Case]:
    """A case for each different layer of a network, in the order in which they first occur."""
    return [
        Case(
            suite, network.name, network.norm, (network.batch, shape.channels, *shape.size),
            network.groups_of(shape), dtype, channels_last, shape.activation, shape.residual, count,
        )
        for shape, count in Counter(network.layers).items()
    ]  # fmt: skip
