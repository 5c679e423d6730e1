"""Time that a test decides about."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """A clock that only work moves on, by microseconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, microseconds: float) -> None:
        self.now += microseconds

    def stopwatch(self, work: Callable[[], None]) -> float:
        start = self.now
        work()
        return self.now - start
