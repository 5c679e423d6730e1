"""What the host does for a step: two launches each way, by the short path, and no waiting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bnfast
from bnfast.kernels import steps
from bnfast.kernels.launch import Launch
from tests.gpu import parity
from tests.gpu.parity import Case
from tests.support.buffers import bit_identical

pytestmark = pytest.mark.gpu

CASES = [
    Case((16, 64, 28, 28), torch.bfloat16),
    Case((16, 64, 28, 28), torch.float32, channels_last=True),
    Case((16, 65, 7, 7), torch.float16, momentum=None),
    Case((16, 64, 28, 28), torch.bfloat16, training=False),
]


@pytest.fixture
def nothing_known() -> Iterator[dict]:
    """The table of steps, emptied for the test."""
    known = dict(steps._steps)
    steps._steps.clear()
    yield steps._steps
    steps._steps.update(known)


def launches_of(known: Iterable[steps.Step]) -> list[Launch]:
    return list({id(launch): launch for step in known for launch in (step.first, step.second)}.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bound_launches_are_used_and_do_what_public_ones_do(case: Case, nothing_known: dict) -> None:
    """After a first call every launch is bound to its compiled kernel. Three ways to the same bits: the first
    call, which is Triton's own; bound launches; and launches that are never bound."""
    tensors = parity.given(case)
    first = parity.run(case, bnfast, tensors)
    known = list(nothing_known.values())
    assert len(known) == 2, "one step each way"
    launches = launches_of(known)
    assert len(launches) == (4 if case.training else 2)
    assert all(launch._bound for launch in launches), "this Triton's launcher is not as expected"
    bound = parity.run(case, bnfast, tensors)
    assert list(nothing_known.values()) == known, "the second call found none of the first one's steps"
    for launch in launches:
        launch._bound, launch._bind_once = None, False
    public = parity.run(case, bnfast, tensors)
    assert not any(launch._bound for launch in launches)
    for name, value in first.items():
        assert bit_identical(bound[name], value), f"{name}, bound"
        assert bit_identical(public[name], value), f"{name}, public"


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_unaligned_tensors_never_meet_kernels_bound_for_aligned_ones(case: Case, nothing_known: dict) -> None:
    """Same sizes, other addresses: a kernel compiled for 16-byte loads would fault or be wrong."""
    for storage in ("dense", "offset", "dense", "offset"):
        parity.check(dataclasses.replace(case, storage=storage))
    unaligned = [launch for launch in launches_of(nothing_known.values()) if not launch._bind_once]
    assert unaligned
    assert not any(launch._bound for launch in unaligned)


def stepper(case: Case) -> Callable[[], object]:
    """A step to repeat, that has run once and so has all it needs."""
    tensors = parity.given(case)
    module = parity.layer(case, bnfast, tensors)

    def again() -> object:
        return parity.step(module, tensors.x, tensors.dy)

    again()
    torch.cuda.synchronize()
    return again


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_step_waits_for_the_gpu(case: Case) -> None:
    """Not for the cumulative average (momentum=None) either, for which torch reads the batch counter."""
    again = stepper(case)
    torch.cuda.set_sync_debug_mode("error")  # what torch then does to wait raises
    try:
        again()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_device(call: Callable[[], object]) -> list[str]:
    """The names of all that a call does on the GPU: kernels, copies and fills."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [event.name for event in events if not getattr(event, "is_user_annotation", False)]


@pytest.fixture
def profiler_works() -> None:
    x = torch.ones(8, device=parity.device())
    on_device(x.neg)  # the first one of a process may come back empty
    seen = on_device(x.neg)
    if len(seen) != 1:
        pytest.skip(f"torch.profiler reports {seen or 'nothing'} for one kernel here")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches(case: Case, profiler_works: None) -> None:
    """Training: two each way for all that the layer does, counting the batch included. Eval: one each way."""
    tensors = parity.given(case)
    module = parity.layer(case, bnfast, tensors)
    x = tensors.x.detach().requires_grad_()
    leaves = [x, module.weight, module.bias]
    torch.autograd.grad(module(x), leaves, tensors.dy)
    outputs: list[torch.Tensor] = []
    forward = on_device(lambda: outputs.append(module(x)))
    backward = on_device(lambda: torch.autograd.grad(outputs[0], leaves, tensors.dy))
    two = ["statistics_kernel", "transform_kernel"], ["gradient_sums_kernel", "gradient_transform_kernel"]
    one = ["transform_kernel"], ["gradient_sums_kernel"]
    assert (forward, backward) == (two if case.training else one)


def test_launches_without_gradients(profiler_works: None) -> None:
    case = dataclasses.replace(CASES[0], training=False)
    tensors = parity.given(case)
    module = parity.layer(case, bnfast, tensors)
    with torch.no_grad():
        module(tensors.x)
        assert on_device(lambda: module(tensors.x)) == ["transform_kernel"]
