"""Launching compiled kernels with little host time, and the memory that outlives a launch.

`kernel[grid](...)` spends 10 us of Python a launch on binding arguments. A `Launch` belongs to one plan,
one set of dtypes and one device, so it binds once and then calls the compiled kernel's launcher directly
(about 1 us). That call is private to Triton: where it does not look as expected, the public one is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.runtime import driver

from .plan import Sweep

INTERPRET: bool = triton.knobs.runtime.interpret


def current_stream(index: int) -> int:
    """The raw handle of the current stream of a CUDA device."""
    return torch._C._cuda_getCurrentRawStream(index)


def is_capturing() -> bool:
    return torch._C._cuda_isCurrentStreamCapturing()


@contextlib.contextmanager
def _loading_allowed() -> Iterator[None]:
    """Lets this thread load a kernel's code while it captures a graph, which the default capture mode
    forbids: a first call may well be a captured one. Loading enqueues nothing, so the graph is none the
    wiser."""
    if torch.version.cuda is None or not is_capturing():
        yield
        return
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; receives the mode it replaces
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def _calling_convention_known() -> bool:
    """Whether the active driver's launcher takes what `Launch` passes: grid, stream, function, then
    Triton's four (metadata, launch metadata, two hooks), then the kernel's arguments. 3.6 collects the last
    two groups in *args, 3.7 names the four."""
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
    """One kernel with its grid, sizes and constants fixed. Call it with the current stream's handle, the
    tensors (or None) and the scalars, each in the kernel's order; sizes come between them, constants last.

    bind_once: the caller vouches that dtypes, None-ness and 16-byte alignment of all tensors are those of
    the first call."""

    __slots__ = (
        "_constants",
        "_function",
        "_grid",
        "_kernel",
        "_lock",
        "_metadata",
        "_options",
        "_run",
        "_sizes",
        "bind_once",
    )

    def __init__(self, kernel: Any, sweep: Sweep, constants: tuple[Any, ...], bind_once: bool) -> None:
        self._kernel, self._grid, self._sizes, self._constants = (
            kernel,
            sweep.programs,
            sweep.sizes,
            constants,
        )
        self.bind_once = bind_once
        self._options: dict[str, int] = {}
        if not INTERPRET:
            target = driver.active.get_current_target()
            # the plan counts warps of 32 threads
            self._options["num_warps"] = max(1, sweep.warps * 32 // target.warp_size)
            if target.backend == "cuda":
                self._options["maxnreg"] = sweep.registers
        self._run: Any = None
        self._function: Any = None
        self._metadata: Any = None
        self._lock = threading.Lock()

    def __call__(self, stream: int, tensors: tuple[torch.Tensor | None, ...], *scalars: float) -> None:
        run = self._run
        if run is None:
            self._first((*tensors, *self._sizes, *scalars, *self._constants))
            return
        # addresses: given a tensor, Triton's launcher asks the driver where it lies
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        run(
            self._grid, 1, 1, stream, self._function, self._metadata, None, None, None,
            *pointers, *self._sizes, *scalars, *self._constants,
        )  # fmt: skip

    def _first(self, args: tuple[Any, ...]) -> None:
        if INTERPRET:
            self._kernel[(self._grid,)](*args)
            return
        with _loading_allowed():
            compiled = self._kernel[(self._grid,)](*args, **self._options)
        if not self.bind_once or not _calling_convention_known():
            return
        with self._lock:  # _run last: another thread may look at it at any moment
            self._function, self._metadata = compiled.function, compiled.packed_metadata
            self._run = compiled.run


_arrivals: dict[tuple[int, int], torch.Tensor] = {}


def arrivals(device: torch.device, index: int, stream: int, count: int) -> torch.Tensor:
    """`count` zeroed int32 counters for one launch on a stream of a device. Kernels leave them at zero.

    Launches on one stream do not overlap, so its counters serve them all, whichever host thread they come
    from. A captured graph may be replayed on any stream, beside anything: it gets counters of its own,
    zeroed within it."""
    if INTERPRET or is_capturing():  # in the interpreter, a program that fails would leave a cached one dirty
        return torch.zeros(count, dtype=torch.int32, device=device)
    cached = _arrivals.get((index, stream))
    if cached is None or cached.numel() < count:
        cached = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _arrivals[index, stream] = cached
    return cached
