"""A driver of no device: everything Triton does on the host to launch a kernel happens, but for the launch.

    with fake_driver() as driver:
        kernel[grid](x, y, n, BLOCK=1024)  # compiled and bound; driver.launches is 1

Kernels are compiled for real. Left out is what only a device answers to: the C launcher, and CUDA itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import ASTSource
from triton.runtime.driver import driver as triton_driver

from .. import dispatch
from ..kernels import launch, launch_plan

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
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}

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


@contextlib.contextmanager
def as_on_a_gpu(target: str = "sm_90") -> Iterator[Any]:
    """Within, CPU tensors take the kernels' path, and all that happens on the host for a launch happens.
    Gives the FakeDriver; in the interpreter there is none."""
    with (
        mock.patch.object(dispatch, "INTERPRET", True),  # what lets CPU tensors to the kernels
        mock.patch.object(dispatch, "_suitable", {}),
        mock.patch.object(launch, "is_capturing", bool),  # False
        contextlib.nullcontext() if launch.INTERPRET else fake_driver(target) as driver,
    ):
        launch_plan.forget_plans()
        try:
            yield driver
        finally:
            launch_plan.forget_plans()


@contextlib.contextmanager
def launching(
    note: Callable[[str, int, dict[str, Any], Callable[[], Any]], None], sms: int, target: str = "sm_90"
) -> Iterator[None]:
    """Within, CPU tensors take the kernels' path, planned for so many multiprocessors, and in place of each
    launch `note` is called: the kernel's name, its programs, its arguments by name, and what compiles it."""

    def noted(self: Any, stream: int, tensors: Any, addresses: Any, *scalars: float) -> None:
        kernel, given = self._kernel, (*self._pick(tensors), *scalars, *self._tail)
        arguments = dict(zip(kernel.arg_names, given, strict=True))
        note(kernel.__name__, self._grid, arguments, lambda: kernel[(self._grid,)](*given, **self._options))

    with (
        mock.patch.dict(os.environ, {"BNFAST_INTERPRETER_SMS": str(sms)}),
        mock.patch.object(launch.Launch, "__call__", noted),
        mock.patch.object(launch, "KEPT", -1),  # every workspace is as large as it has to be
        as_on_a_gpu(target),
    ):
        yield
