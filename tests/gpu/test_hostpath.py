"""What the host does for a step: one launch, or two or three, each way, by the short path, and no waiting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bnfast
from bnfast.checks import one_step
from bnfast.checks.cases import Case, batch_renorm, group_norm, instance_norm
from bnfast.kernels import launch_plan
from bnfast.kernels.launch import Launch
from tests.gpu import parity
from tests.support.buffers import bit_identical

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    Case((16, 64, 28, 28), BF16),
    Case((16, 64, 28, 28), FP32, channels_last=True),
    Case((16, 65, 7, 7), FP16, momentum=None),
    Case((16, 64, 28, 28), BF16, training=False),
]
RENORMED = [batch_renorm((16, 64, 28, 28), BF16, last) for last in (False, True)]
HELD = [  # a program holds a whole group or more
    group_norm((16, 64, 28, 28), BF16, groups=8),
    group_norm((100, 64, 3, 3), FP32, groups=32),
    instance_norm((16, 64, 28, 28), FP16),
]
SWEPT = [
    group_norm((2, 64, 256, 256), BF16, groups=8),
    group_norm((16, 64, 28, 28), BF16, True, groups=8),
    instance_norm((16, 65, 7, 7), FP32, True),
]

# the kernels that a step launches, forward and backward
TWICE = ("statistics_kernel", "transform_kernel"), ("gradient_sums_kernel", "gradient_transform_kernel")
EVAL = ("transform_kernel",), ("gradient_sums_kernel",)
ONCE = ("group_norm_kernel",), ("group_norm_gradients_kernel", "column_sums_kernel")
BY_SAMPLE = TWICE[0], ("gradient_sums_kernel", "column_sums_kernel", "gradient_transform_kernel")
LAUNCHES = [
    *((case, *(TWICE if case.training else EVAL)) for case in CASES),
    *((case, *TWICE) for case in RENORMED),
    *((case, *ONCE) for case in HELD),
    *((case, *BY_SAMPLE) for case in SWEPT),
]
Names = tuple[str, ...]
every_way = pytest.mark.parametrize(
    ("case", "forward", "backward"), [pytest.param(*one, id=str(one[0])) for one in LAUNCHES]
)


@pytest.fixture
def nothing_known() -> Iterator[dict]:
    """The table of steps, emptied for the test."""
    known = dict(launch_plan._plans)
    launch_plan._plans.clear()
    yield launch_plan._plans
    launch_plan._plans.update(known)


def launches_of(known: Iterable[Any]) -> list[Launch]:
    found = (part for step in known for part in vars(step).values() if isinstance(part, Launch))
    return list({id(launch): launch for launch in found}.values())


@every_way
def test_bound_launches_are_used_and_do_what_public_ones_do(
    case: Case, forward: Names, backward: Names, nothing_known: dict
) -> None:
    """After a first call every launch is bound to its compiled kernel. Three ways to the same bits: the first
    call, which is Triton's own; bound launches; and launches that are never bound."""
    tensors = parity.given(case)
    first = one_step.run(case, bnfast, tensors)
    known = list(nothing_known.values())
    assert len(known) == 2, "one step each way"
    launches = launches_of(known)
    assert len(launches) == len(forward) + len(backward)
    assert all(launch._bound for launch in launches), "this Triton's launcher is not as expected"
    bound = one_step.run(case, bnfast, tensors)
    assert list(nothing_known.values()) == known, "the second call found none of the first one's steps"
    for launch in launches:
        launch._bound, launch._bind_once = None, False
    public = one_step.run(case, bnfast, tensors)
    assert not any(launch._bound for launch in launches)
    for name, value in first.items():
        assert bit_identical(bound[name], value), f"{name}, bound"
        assert bit_identical(public[name], value), f"{name}, public"


@pytest.mark.parametrize("case", [*CASES[:2], RENORMED[0], *HELD, *SWEPT], ids=str)
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
    module = one_step.layer(case, bnfast, tensors)

    def again() -> object:
        return one_step.step(module, tensors.x, tensors.dy)

    again()
    torch.cuda.synchronize()
    return again


TRACKING = instance_norm((16, 64, 28, 28), BF16, tracked=True)


@pytest.mark.parametrize("case", [*CASES, *RENORMED, *HELD, *SWEPT, TRACKING], ids=str)
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


@every_way
def test_launches(case: Case, forward: Names, backward: Names, profiler_works: None) -> None:
    """BatchNorm and Batch Renormalization: two each way for all that the layer does, counting the batch
    included; eval: one each way. GroupNorm and InstanceNorm: one forward where groups are held, else two; to
    which the backward adds one that sums over samples."""
    tensors = parity.given(case)
    module = one_step.layer(case, bnfast, tensors)
    x = tensors.x.detach().requires_grad_()
    leaves = [x, module.weight, module.bias]
    torch.autograd.grad(module(x), leaves, tensors.dy)
    outputs: list[torch.Tensor] = []
    assert on_device(lambda: outputs.append(module(x))) == list(forward)
    assert on_device(lambda: torch.autograd.grad(outputs[0], leaves, tensors.dy)) == list(backward)


def test_launches_without_gradients(profiler_works: None) -> None:
    case = dataclasses.replace(CASES[0], training=False)
    tensors = parity.given(case)
    module = one_step.layer(case, bnfast, tensors)
    with torch.no_grad():
        module(tensors.x)
        assert on_device(lambda: module(tensors.x)) == ["transform_kernel"]
