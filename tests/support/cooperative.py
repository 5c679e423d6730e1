"""Interpreted programs in other orders than one after another from the first to the last.

`shuffled` runs the programs of each launch in a random order: a kernel whose last program finalises must give
the same bits under any. `cooperative` has all of them under way at once and changes between them at atomics:
grid barriers then terminate as they do on a device, and deadlocks are found.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

Program = tuple[int, int, int]
Body = Callable[[Program], None]  # runs one program from its first line to its last
Strategy = Callable[[list[Program], Body], None]  # runs all programs of a launch

PATIENCE = 50  # turns a program may have, on average, while none of them changes anything


class Deadlock(RuntimeError):
    """All programs of a launch wait for something that none of them will do."""


class _Stopped(BaseException):
    """Unwinds a program whose launch has failed. No Exception, since the interpreter would wrap it."""


class _WholeGrid:
    """Takes the place of a kernel in a launch of one program, and runs the real grid by `strategy`."""

    def __init__(self, executor: interpreter.GridExecutor, strategy: Strategy) -> None:
        self._kernel, self._grid, self._strategy = executor.fn, executor.grid, strategy
        # What the interpreter looks at in a kernel.
        self.__name__ = self._kernel.__name__
        self.__globals__ = self._kernel.__globals__
        self.__signature__ = inspect.signature(self._kernel)

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        grid = self._grid(arguments) if callable(self._grid) else self._grid
        grid = (*grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)

        def body(program: Program) -> None:
            builder.set_grid_idx(*program)
            self._kernel(**arguments)

        self._strategy(list(np.ndindex(*grid)), body)


@contextlib.contextmanager
def _launching_by(strategy: Strategy) -> Iterator[None]:
    call = interpreter.GridExecutor.__call__

    def launch(executor: interpreter.GridExecutor, *args: Any, **options: Any) -> None:
        whole = _WholeGrid(executor, strategy)
        try:
            with mock.patch.multiple(executor, fn=whole, grid=(1,)):
                call(executor, *args, **options)
        except InterpreterError as error:
            # The interpreter wraps whatever a program raises; a deadlock should be caught by its own name.
            raise (error.__cause__ if isinstance(error.__cause__, Deadlock) else error) from None

    with mock.patch.object(interpreter.GridExecutor, "__call__", launch):
        yield


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of each launch one after another, in a random order."""
    chance = random.Random(seed)

    def run(programs: list[Program], body: Body) -> None:
        chance.shuffle(programs)
        for program in programs:
            body(program)

    with _launching_by(run):
        yield


class _Schedule:
    """The programs of one launch as threads, of which only the holder of the turn runs."""

    def __init__(self, programs: list[Program], body: Body, chance: random.Random) -> None:
        self._body, self._chance = body, chance
        self._turns = {program: threading.Semaphore(0) for program in programs}
        self._waiting = list(programs)  # everyone not finished, the holder of the turn included
        self._holder: Program = (0, 0, 0)
        self._idle = 0  # turns since memory last changed or a program ended
        self._error: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self._run_one, args=(p,), daemon=True) for p in self._waiting]
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def switch(self, progressed: bool) -> None:
        """Called by the running program at an atomic: hand the turn over and wait for the next."""
        program = self._holder
        self._idle = 0 if progressed else self._idle + 1
        if self._idle > PATIENCE * len(self._waiting):
            self._error = Deadlock(f"{len(self._waiting)} programs wait, and none changes anything")
        self._pass_on()
        self._wait(program)

    def _run_one(self, program: Program) -> None:
        try:
            self._wait(program)
            self._body(program)
        except _Stopped:
            return
        except BaseException as error:
            self._error = error
        self._waiting.remove(program)
        self._idle = 0
        self._pass_on()

    def _pass_on(self) -> None:
        if self._error is not None:
            for turn in self._turns.values():
                turn.release()
        elif self._waiting:
            self._turns[self._chance.choice(self._waiting)].release()

    def _wait(self, program: Program) -> None:
        self._turns[program].acquire()
        if self._error is not None:
            raise _Stopped
        self._holder = program
        interpreter.interpreter_builder.set_grid_idx(*program)


@contextlib.contextmanager
def cooperative(seed: int = 0) -> Iterator[None]:
    """Run all programs of each launch concurrently, in a random interleaving of what lies between atomics.

    Raises Deadlock when all of them wait in vain. A program that spins on a plain load is not noticed.
    """
    chance = random.Random(seed)
    running: list[_Schedule] = []

    def run(programs: list[Program], body: Body) -> None:
        running.append(_Schedule(programs, body, chance))
        try:
            running[-1].run()
        finally:
            running.pop()

    builder = interpreter.InterpreterBuilder
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def switching_rmw(self, operation, pointers, value, mask, *semantics):
        before = rmw(self, operation, pointers, value, mask, *semantics)
        running[-1].switch(progressed=_changed(pointers, mask.data, before))
        return before

    def switching_cas(self, pointers, expected, value, *semantics):
        before = cas(self, pointers, expected, value, *semantics)
        running[-1].switch(progressed=_changed(pointers, np.ones_like(pointers.data, bool), before))
        return before

    with (
        _launching_by(run),
        mock.patch.object(builder, "create_atomic_rmw", switching_rmw),
        mock.patch.object(builder, "create_atomic_cas", switching_cas),
    ):
        yield


def _changed(pointers: interpreter.TensorHandle, mask: np.ndarray, before: interpreter.TensorHandle) -> bool:
    """Whether an atomic that returned `before` left something else in memory."""
    mask = np.broadcast_to(mask, pointers.data.shape)
    after = interpreter._interpreter.load(pointers.data, mask, before.data, before.data.dtype)
    return after.tobytes() != before.data.tobytes()
