"""A driver of no device: everything Triton does on the host to launch a kernel happens, but for the launch.

    with fake_driver():
        microseconds = host_microseconds(lambda: kernel[grid](x, y, n, BLOCK=1024), calls=100)

Kernels are compiled for real. Left out is what only a device answers to: the C launcher, and CUDA itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import timeit
from collections.abc import Callable, Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource
from triton.runtime.driver import driver as triton_driver

from codegen import SMS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Triton and its kernels keep caches by device. No real device has a number below zero, nor is one used again.
DEVICES = itertools.count(-1, -1)


class FakeDriver:
    """What Triton asks of a driver, and of the C extension that talks to CUDA (`utils`), answered for one
    device that does not exist. Counts its `launches`, and the modules that are `unloaded`."""

    def __init__(self, target: str) -> None:
        self.launches = self.unloaded = 0
        self.utils = self
        self._target, self._device = TARGETS[target], next(DEVICES)
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

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads a CTA

    def unload_module(self, module: int) -> None:  # called by Triton 3.8 and newer
        self.unloaded += 1

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": SMS, "warpSize": 32}

    def _launcher(self) -> type:
        """A class in place of Triton's CudaLauncher, and of its signature, which callers may look at."""
        driver = self

        class Launcher:
            def __init__(self, source: ASTSource, metadata: Any) -> None:
                driver._launched.append(source)

            @functools.wraps(CudaLauncher.__call__)
            def __call__(self, *arguments: Any) -> None:
                launch_metadata, enter, leave = arguments[6:9]  # behind five and the metadata
                if enter is not None:
                    enter(launch_metadata)
                driver.launches += 1
                if leave is not None:
                    leave(launch_metadata)

        return Launcher

    def compiled(self) -> list[Any]:
        """The kernels that were compiled for this driver and are in the caches of their functions."""
        caches = (source.fn.device_caches.get(self._device, ({},))[0] for source in self._launched)
        return [kernel for cache in caches for kernel in cache.values()]

    def forget(self) -> None:
        """Take the compiled kernels out of the caches. Some live on in other places: of these nothing is to
        be unloaded, by whichever driver there will be then."""
        for kernel in self.compiled():
            kernel.module = None
        for source in self._launched:
            source.fn.device_caches.pop(self._device, None)


@contextlib.contextmanager
def fake_driver(target: str = "sm_90") -> Iterator[FakeDriver]:
    """Let Triton launch on a device that does not exist, of one of TARGETS."""
    fake = FakeDriver(target)
    real = triton_driver._active  # .active would look for a device where none is set
    triton_driver.set_active(fake)
    try:
        yield fake
    finally:
        triton_driver.set_active(real)
        fake.forget()


def host_microseconds(call: Callable[[], object], calls: int) -> float:
    """Microseconds that one of so many calls takes, after as many that may compile."""
    _, seconds = timeit.repeat(call, number=calls, repeat=2)
    return seconds / calls * 1e6
