"""Launching compiled kernels with little host time, and the memory that outlives a launch.

`kernel[grid](...)` spends 10 us of Python a launch on binding arguments. A `Launch` belongs to one plan, one set of dtypes and
one device, so it binds once and then calls the compiled kernel's launcher directly (about 1 us). That call is private to
Triton: where it does not look as expected, the public one is used.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
import triton
from triton.runtime import driver

INTERPRET: bool = triton.knobs.runtime.interpret


def current_stream(index: int) -> int:
    """The raw handle of the current stream of a CUDA device."""
    return torch._C._cuda_getCurrentRawStream(index)


def is_capturing() -> bool:
    return torch._C._cuda_isCurrentStreamCapturing()


def _calling_convention_known() -> bool:
    """Whether the active driver's launcher takes what `Launch` passes: grid, stream, function, then Triton's four (metadata,
    launch metadata, two hooks), then the kernel's arguments. 3.6 collects the last two groups in *args, 3.7 names the four."""
    try:
        if driver.active.get_current_target().backend != "cuda":
            return False
        names = list(inspect.signature(driver.active.launcher_cls.__call__).parameters)
    except (ValueError, TypeError, AttributeError):
        return False
    four = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]
    start = ["self", "gridX", "gridY", "gridZ", "stream", "function"]
    return names in ([*start, "args"], [*start, *four, "args"])


class Launch:
    """One kernel with its grid and constants fixed. Call it with the device's index and the kernel's run-time arguments.

    bind_once: the caller vouches that dtypes, None-ness and 16-byte alignment of all arguments are those of the first call.
    """

    __slots__ = ("_constants", "_function", "_kernel", "_lock", "_metadata", "_options", "_run", "bind_once", "grid")

    def __init__(
        self, kernel: Any, programs: int, warps: int, registers: int, constants: tuple[Any, ...], bind_once: bool
    ) -> None:
        self.grid, self.bind_once = programs, bind_once
        self._options: dict[str, int] = {}
        if not INTERPRET:
            target = driver.active.get_current_target()
            self._options["num_warps"] = max(1, warps * 32 // target.warp_size)  # the plan counts warps of 32 threads
            if target.backend == "cuda":
                self._options["maxnreg"] = registers
        self._kernel, self._constants = kernel, constants
        self._run: Any = None
        self._function: Any = None
        self._metadata: Any = None
        self._lock = threading.Lock()

    def __call__(self, index: int, *args: Any) -> None:
        run = self._run
        if run is None:
            self._first(args)
            return
        pointers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        run(
            self.grid, 1, 1, current_stream(index), self._function, self._metadata, None, None, None,
            *pointers, *self._constants,
        )  # fmt: skip

    def _first(self, args: tuple[Any, ...]) -> None:
        if INTERPRET:
            self._kernel[(self.grid,)](*args, *self._constants)
            return
        compiled = self._kernel[(self.grid,)](*args, *self._constants, **self._options)
        if not self.bind_once or not _calling_convention_known():
            return
        with self._lock:  # _run last: another thread may look at it at any moment
            self._function, self._metadata = compiled.function, compiled.packed_metadata
            self._run = compiled.run


_arrivals: dict[tuple[int, int], torch.Tensor] = {}


def arrivals(device: torch.device, index: int, count: int) -> torch.Tensor:
    """`count` zeroed int32 counters for one launch on the current stream. Kernels leave them at zero.

    Launches on one stream do not overlap, so its counters serve them all, whichever host thread they come from. A captured
    graph may be replayed on any stream, beside anything: it gets counters of its own, zeroed within the graph.
    """
    if device.type == "cpu":
        return torch.zeros(count, dtype=torch.int32)
    if is_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (index, current_stream(index))
    cached = _arrivals.get(key)
    if cached is None or cached.numel() < count:
        cached = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _arrivals[key] = cached
    return cached
