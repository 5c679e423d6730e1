"""A driver of no device: everything Triton does on the host to launch a kernel happens, but for the launch.

    with fake_driver() as driver:
        microseconds = host_microseconds(lambda: kernel[grid](x, y, n, BLOCK=1024))

Kernels are compiled for real. Left out is what only a device answers to: the C launcher, and CUDA itself.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource
from triton.runtime.driver import driver as triton_driver

HOPPER = GPUTarget("cuda", 90, 32)

# Triton and its kernels keep caches by device. No real device has a number below zero, nor is one used again.
DEVICES = itertools.count(-1, -1)


class _Utils:
    """Stands for the C extension that talks to CUDA. Counts what is `unloaded`."""

    def __init__(self) -> None:
        self.unloaded = 0

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads a CTA

    def unload_module(self, module: int) -> None:  # called by Triton 3.8 and newer
        self.unloaded += 1

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}


class FakeDriver:
    """What Triton asks of a driver, answered for one device that does not exist. Counts its `launches`."""

    def __init__(self, target: GPUTarget) -> None:
        self.launches: int = 0
        self.utils = _Utils()
        self._target = target
        self._device = next(DEVICES)
        self._launched: list[ASTSource] = []
        self.launcher_cls = self._launcher()

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def _launcher(self) -> type:
        """A class in place of Triton's CudaLauncher, and of its signature, which callers may look at."""
        driver = self

        class Launcher:
            def __init__(self, source: ASTSource, metadata: Any) -> None:
                driver._launched.append(source)

            def __call__(self, *arguments: Any) -> None:
                launch_metadata, enter, leave = arguments[6:9]  # behind five and the metadata
                if enter is not None:
                    enter(launch_metadata)
                driver.launches += 1
                if leave is not None:
                    leave(launch_metadata)

        vars(Launcher)["__call__"].__signature__ = inspect.signature(CudaLauncher.__call__)
        return Launcher

    def forget(self) -> None:
        """Take the kernels compiled for this driver out of the caches of their functions. Some live on in
        other places: of these nothing is to be unloaded, by whichever driver there will be then."""
        for source in self._launched:
            kernels, *_ = source.fn.device_caches.pop(self._device, ({},))
            for kernel in kernels.values():
                kernel.module = None


@contextlib.contextmanager
def fake_driver(target: GPUTarget = HOPPER) -> Iterator[FakeDriver]:
    """Let Triton launch on a device that does not exist."""
    fake = FakeDriver(target)
    real = triton_driver._active  # .active would look for a device where none is set
    triton_driver.set_active(fake)
    try:
        yield fake
    finally:
        triton_driver.set_active(real)
        fake.forget()


def host_microseconds(call: Callable[[], object], calls: int = 1000, rounds: int = 7) -> float:
    """Microseconds one call takes: the median of some rounds, after a first that may compile."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times[1:])
