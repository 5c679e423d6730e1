"""What a launch says to Triton, which hooks it calls, and what it keeps alive; with a driver of no device."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from triton.runtime.driver import driver as triton_driver

from benchmarks import machine
from bnfast.kernels import launch_plan
from bnfast.ptx.driver import FakeDriver, as_on_a_gpu, fake_driver
from codegen.sass import compile_kernel
from tests.support import kernel_calls as kernels
from tests.support import toys

pytestmark = [pytest.mark.static, pytest.mark.usefixtures("two_launches")]

runtime = triton.knobs.runtime


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with as_on_a_gpu() as driver:
        yield driver


def forward(columns: int = 2) -> None:
    """Two launches, of BatchNorm's kernels for large tensors."""
    kernels.batch_norm_train(torch.ones(2, 4, 2, columns))


def bound() -> list[Any]:
    """What each launch that is known keeps of its compiled kernel: None before there is one to keep."""
    return [launch._bound for step in launch_plan._plans.values() for launch in (step.first, step.second)]


@pytest.mark.parametrize("default", [None, "0", "1"])
def test_contraction_is_no_matter_of_a_default(
    default: str | None, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default that versions and environments change must not decide how results are rounded. Triton 3.9
    warns whoever relies on it, once a process."""
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    if default is not None:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    if hasattr(triton._utils, "warn_once"):
        triton._utils.warn_once.cache_clear()
    x = torch.ones(1024)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward()
        machine.copy(x, x)
        compile_kernel(toys.copy, x, x, 1024, BLOCK=64)
    found = {kernel.name: kernel.metadata.enable_fp_fusion for kernel in driver.compiled()}
    names = ("statistics_kernel", "transform_kernel", "copy_kernel")
    assert found == dict.fromkeys(names, True)


@contextlib.contextmanager
def hooked(name: str, hook: Callable[..., None], how: str = "chained") -> Iterator[None]:
    """Triton calls the hook at each launch: it is added to Triton's own chain, or to another one in its
    place, or takes that place itself."""
    default = getattr(runtime, name)
    chain = default if how == "chained" else type(default)()
    chain.add(hook)
    with pytest.MonkeyPatch.context() as patch:
        if how != "chained":
            patch.setattr(runtime, name, hook if how == "assigned" else chain)
        try:
            yield
        finally:
            chain.remove(hook)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("how", ["chained", "another chain", "assigned"])
def test_hooks_see_every_launch(how: str, name: str, driver: FakeDriver) -> None:
    """Those that bound launches make as well, which are bound from the second call on; however the hook was
    set, and no more once it is gone."""
    seen: list[str] = []
    for _ in range(2):
        forward()
    before = bound()
    assert len(before) == 2
    assert all(before)
    with hooked(name, lambda launch_metadata: seen.append(launch_metadata.get()["name"]), how):
        forward()
        forward()
        assert seen == ["statistics_kernel", "transform_kernel"] * 2
    forward()
    assert len(seen) == 4
    assert driver.launches == 10
    assert bound() == before


@pytest.mark.usefixtures("driver")
def test_code_compiled_for_hooks_is_not_kept() -> None:
    """A profiler may ask for code that is not what runs without it."""
    with hooked("launch_enter_hook", lambda launch_metadata: None):
        forward()
        assert bound() == [None, None]
    forward()
    assert all(bound())


def test_a_launch_keeps_its_code_loaded(driver: FakeDriver) -> None:
    """Triton unloads a kernel's module with the kernel, which its caches may be the only ones to hold."""
    forward(columns=3)
    kernels = [weakref.ref(kernel) for kernel in driver.compiled()]
    driver.forget()
    gc.collect()
    assert len(kernels) == 2
    assert all(kernel() is not None for kernel in kernels)
    launch_plan.forget_plans()
    gc.collect()
    assert not any(kernel() for kernel in kernels)


def test_nothing_is_left_of_a_driver(capfd: pytest.CaptureFixture[str]) -> None:
    """The one before comes back, and of a kernel that lives on neither a device nor the lack of one hears."""
    before = triton_driver._active
    with contextlib.suppress(KeyboardInterrupt), fake_driver() as first:
        launched = toys.copy[(1,)](torch.ones(16), torch.ones(16), 16, BLOCK=16, enable_fp_fusion=True)
        assert launched.module is not None
        assert toys.copy.device_caches
        raise KeyboardInterrupt
    assert triton_driver._active is before
    assert not toys.copy.device_caches
    with fake_driver() as second:
        del launched
        gc.collect()
        assert (first.unloaded, second.unloaded) == (0, 0)
        assert second.get_current_device() < first.get_current_device() < 0
    assert "Exception ignored" not in capfd.readouterr().err
