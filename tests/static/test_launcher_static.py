"""What a launch says to Triton, whom it tells of itself, what it keeps alive; with a driver of no device."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton

from benchmarks import machine
from bnfast.kernels import launch_plan
from bnfast.kernels.launch import Launch
from codegen.fake_driver import FakeDriver, fake_driver
from codegen.launches import as_on_a_gpu
from codegen.sass import compile_kernel
from tests.support import kernel_calls as kernels
from tests.support import toys

pytestmark = pytest.mark.static

runtime = triton.knobs.runtime


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with as_on_a_gpu() as driver:
        yield driver


def forward(columns: int = 2) -> None:
    """Two launches."""
    kernels.batch_norm_train(torch.ones(2, 4, 2, columns))


def known() -> list[Launch]:
    return [launch for step in launch_plan._plans.values() for launch in (step.first, step.second)]


def launch_them_all() -> None:
    forward()
    x = torch.ones(1024)
    machine.copy(x, x)
    machine.empty(x, 1)


def compile_one() -> None:
    compile_kernel(toys.copy, {"x": "*fp16", "y": "*fp16", "n": "i32"}, {"BLOCK": 64})


def compiled_by(driver: FakeDriver) -> list[Any]:
    caches = [source.fn.device_caches[driver.get_current_device()][0] for source in driver._launched]
    return [kernel for cache in caches for kernel in cache.values()]


@pytest.mark.parametrize("default", ["0", "1"])
def test_contraction_is_no_matter_of_a_default(
    default: str, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default that versions and environments change must not decide how results are rounded."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    launch_them_all()
    found = compiled_by(driver)
    assert {kernel.name for kernel in found} == {
        "statistics_kernel", "transform_kernel", "copy_kernel", "empty_kernel",
    }  # fmt: skip
    assert all(kernel.metadata.enable_fp_fusion for kernel in found)


@pytest.mark.parametrize("work", [launch_them_all, compile_one])
@pytest.mark.usefixtures("driver")
def test_no_launch_is_warned_of_a_default(work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns whoever does not say whether products are to be contracted, once a process."""
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    warn_once = getattr(triton._utils, "warn_once", None)
    if warn_once is not None:
        warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work()


def chained(hook: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], None]:
    chain = getattr(runtime, name)
    chain.add(hook)
    return lambda: chain.remove(hook)


def assigned(hook: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], None]:
    monkeypatch.setattr(runtime, name, hook)
    return monkeypatch.undo


def own_chain(hook: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], None]:
    chain = type(getattr(runtime, name))()
    monkeypatch.setattr(runtime, name, chain)
    chain.add(hook)
    return lambda: chain.remove(hook)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("add", [chained, assigned, own_chain])
def test_hooks_see_every_launch(
    add: Callable[..., Callable[[], None]], name: str, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that bound launches make as well, however the hook was set, and no more once it is gone."""
    seen: list[str] = []

    def hook(launch_metadata: Any) -> None:
        seen.append(launch_metadata.get()["name"])

    for _ in range(2):
        forward()
    bound = [launch._bound for launch in known()]
    assert all(bound)
    remove = add(hook, monkeypatch, name)
    try:
        forward()
        forward()
        assert seen == ["statistics_kernel", "transform_kernel"] * 2
    finally:
        remove()
    forward()
    assert len(seen) == 4
    assert driver.launches == 10
    assert [launch._bound for launch in known()] == bound


@pytest.mark.usefixtures("driver")
def test_code_compiled_for_hooks_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler may ask for code that is not what runs without it."""
    remove = chained(lambda launch_metadata: None, monkeypatch, "launch_enter_hook")
    try:
        forward()
        assert not any(launch._bound for launch in known())
    finally:
        remove()
    forward()
    assert all(launch._bound for launch in known())


def test_a_launch_keeps_its_code_loaded(driver: FakeDriver) -> None:
    """Triton unloads a kernel's module with the kernel, which its caches may be the only ones to hold."""
    forward(columns=3)
    kernels = [weakref.ref(kernel) for kernel in compiled_by(driver)]
    driver.forget()
    gc.collect()
    assert len(kernels) == 2
    assert all(kernel() is not None for kernel in kernels)
    launch_plan.forget_plans()
    gc.collect()
    assert not any(kernel() for kernel in kernels)


def test_nothing_is_unloaded_by_another_driver(capfd: pytest.CaptureFixture[str]) -> None:
    """A kernel that outlives the driver of no device: neither a device nor the lack of one hears of it."""
    with fake_driver() as first:
        launched = machine.empty_kernel[(1,)](torch.ones(16), **machine.OPTIONS)
        assert launched.module is not None
    with fake_driver() as second:
        del launched
        gc.collect()
        assert (first.utils.unloaded, second.utils.unloaded) == (0, 0)
    assert "Exception ignored" not in capfd.readouterr().err
