"""What launches that were executed moved together, of each tensor.

with moved(launched) as t:
    y = layer(x)
assert t.of(x).reads == 2.0 and t.of(y).writes == 1.0 and t.launches == 2
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from bnfast.ptx import Execution
from bnfast.ptx.traffic import Traffic


class Moved:
    """traffic: by address. names: of each address, the name that the first kernel had for it."""

    def __init__(self) -> None:
        self.launches = 0
        self.traffic: dict[int, Traffic] = {}
        self.names: dict[int, str] = {}

    def add(self, launch: Execution) -> None:
        self.launches += 1
        for name, t in {id(t): (name, t) for name, t in reversed(launch.tensors.items())}.values():
            self.names.setdefault(t.address, name)
            self.traffic[t.address] = self.traffic[t.address] + t if t.address in self.traffic else t

    def of(self, tensor: Tensor) -> Traffic:
        """No traffic, if no kernel was given the tensor."""
        size = tensor.nbytes
        nothing = Traffic(tensor.data_ptr(), size, np.zeros(tensor.numel(), np.uint8), np.zeros(4, np.int64))
        return self.traffic.get(tensor.data_ptr(), nothing)

    def named(self, *names: str) -> list[Traffic]:
        return [self.traffic[address] for address, name in self.names.items() if name in names]


@contextlib.contextmanager
def moved(launched: list[Execution]) -> Iterator[Moved]:
    """Those of the launches in this list, which grows, that are made within."""
    found, before = Moved(), len(launched)
    yield found
    for launch in launched[before:]:
        found.add(launch)
