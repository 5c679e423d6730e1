"""Data races between the programs of one launch, found by happens-before rather than by luck of the order.

Two accesses by different programs to one byte, at least one of them a store, race unless a chain of atomics
orders them: the earlier program must release (after a barrier) what the later one acquires. So a finaliser
that reads other programs' partials is fine exactly when its synchronisation is, and needs no exemption.

The barrier matters because one thread performs the atomic: it releases what the *other* threads of the
program stored only if `tl.debug_barrier()` came between. Triton emits none by itself, for NVIDIA or for AMD.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Program = tuple[int, int, int]
Access = Literal["load", "store", "atomic"]
Epochs = dict[Program, int]  # how far into each program something reaches; epochs end at barriers

# What each access must be ordered after. Atomics do not race with one another.
CONFLICTS: dict[Access, tuple[Access, ...]] = {
    "load": ("store", "atomic"),
    "store": ("load", "store", "atomic"),
    "atomic": ("load", "store"),
}


class Races:
    """The happens-before order of one launch, fed with accesses, barriers and atomics as they occur."""

    def __init__(self) -> None:
        self._epoch: Epochs = {}
        self._seen: dict[Program, Epochs] = {}  # vector clocks: what happened before each program's next step
        self._released: dict[int, Epochs] = {}  # the same, left at an address by releasing atomics
        self._sets: list[Epochs] = [{}]  # sets of epochs by number; 0 is the empty one
        self._numbers: dict[tuple[int, Program, int], int] = {}
        # For each range (by its start) and kind of access: the number of the set that made it, a byte.
        self._made: dict[int, dict[Access, np.ndarray]] = {}

    def access(
        self, start: int, size: int, offsets: np.ndarray, access: Access, program: Program
    ) -> list[Access]:
        """Record one operation on the bytes `offsets` of the range (start, size).

        Returns the kinds of earlier accesses by other programs that it races with.
        """
        if start not in self._made:
            self._made[start] = {kind: np.zeros(size, np.int32) for kind in CONFLICTS}
        made = self._made[start]
        # The thread that performs an atomic needs no barrier to order it before its own later release.
        epoch = self._epoch.get(program, 2) - (access == "atomic")
        raced = [
            earlier
            for earlier in CONFLICTS[access]
            if not all(self._ordered(n, program) for n in np.unique(made[earlier][offsets]).tolist())
        ]
        numbers, lanes = np.unique(made[access][offsets], return_inverse=True)
        if access == "store":  # what was stored before is either ordered before this or reported
            numbers = np.zeros_like(numbers)
        joined = np.array([self._join(n, program, epoch) for n in numbers.tolist()], np.int32)
        made[access][offsets] = joined[lanes]
        return raced

    def barrier(self, program: Program) -> None:
        """All threads of the program have met."""
        self._epoch[program] = self._epoch.get(program, 2) + 1

    def synchronise(self, addresses: np.ndarray, program: Program, acquires: bool, releases: bool) -> None:
        """An atomic on `addresses`: take over what was released there, leave what the program may release."""
        seen = self._seen.setdefault(program, {})
        for address in addresses.tolist():
            left = self._released.setdefault(address, {})
            if acquires:
                _advance(seen, left)
            if releases:
                _advance(left, seen | {program: self._epoch.get(program, 2) - 1})

    def _ordered(self, number: int, program: Program) -> bool:
        seen = self._seen.get(program, {})
        return all(
            other == program or seen.get(other, 0) >= epoch for other, epoch in self._sets[number].items()
        )

    def _join(self, number: int, program: Program, epoch: int) -> int:
        """The number of a set of epochs with one more in it. Few differ, so that bytes share them."""
        key = number, program, epoch
        if key not in self._numbers:
            self._numbers[key] = len(self._sets)
            self._sets.append(self._sets[number] | {program: epoch})
        return self._numbers[key]


def _advance(clock: Epochs, other: Epochs) -> None:
    for program, epoch in other.items():
        clock[program] = max(clock.get(program, 0), epoch)
