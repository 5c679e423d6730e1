"""What the host does for a step: one launch, or two or three, each way, by the short path, and no waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bnfast
from bnfast.checks import fp64, one_step
from bnfast.checks.cases import Case, batch_renorm, given, group_norm, instance_norm, layer_norm
from bnfast.kernels.launch import Launch
from tests.support.buffers import assert_same_bits, shifted
from tests.support.families import BF16, FP16, FP32, layouts

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SIZE = (16, 64, 28, 28)
Names = tuple[str, ...]
# the kernels that a step launches, forward and backward
TWICE = ("statistics_kernel", "transform_kernel"), ("gradient_sums_kernel", "gradient_transform_kernel")
ONCE = ("group_norm_kernel",), ("group_norm_gradients_kernel", "column_sums_kernel")
BY_SAMPLE = TWICE[0], ("gradient_sums_kernel", "column_sums_kernel", "gradient_transform_kernel")
BY_ROW = ("row_norm_kernel",), ("row_gradients_kernel", "column_sums_kernel")
EVAL = Case(SIZE, BF16, training=False)
LAUNCHES = [
    (Case(SIZE, BF16), *TWICE),
    (Case(SIZE, FP32, channels_last=True), *TWICE),
    (Case((16, 65, 7, 7), FP16, momentum=None), *TWICE),
    (EVAL, ("transform_kernel",), ("gradient_sums_kernel",)),
    *((case, *TWICE) for case in layouts(batch_renorm(SIZE, BF16))),
    # a program holds a whole group or more
    (group_norm(SIZE, BF16, groups=8), *ONCE),
    (group_norm((100, 64, 3, 3), FP32, groups=32), *ONCE),
    (instance_norm(SIZE, FP16), *ONCE),
    (group_norm((2, 64, 256, 256), BF16, groups=8), *BY_SAMPLE),
    (group_norm(SIZE, BF16, True, groups=8), *BY_SAMPLE),
    (instance_norm((16, 65, 7, 7), FP32, True), *BY_SAMPLE),
    (layer_norm((257, 776), BF16), *BY_ROW),
]
CASES = [case for case, *_ in LAUNCHES]
every_way = pytest.mark.parametrize(
    ("case", "forward", "backward"), [pytest.param(*one, id=str(one[0])) for one in LAUNCHES]
)


def launches_of(known: Iterable[Any]) -> list[Launch]:
    values = [value for plan in known for value in vars(plan).values()]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return list({id(part): part for part in parts if isinstance(part, Launch)}.values())


@every_way
def test_bound_launches_are_used_and_do_what_public_ones_do(
    case: Case, forward: Names, backward: Names, nothing_known: dict
) -> None:
    """After a first call every launch is bound to its compiled kernel. Three ways to the same bits: the first
    call, which is Triton's own; bound launches; and launches that are never bound."""
    tensors = given(case, CUDA)
    first = one_step.run(case, bnfast, tensors)
    known = list(nothing_known.values())
    assert len(known) == 2, "one launch plan each way"
    launches = launches_of(known)
    assert len(launches) == len(forward) + len(backward)
    assert all(launch._bound for launch in launches), "this Triton's launcher is not as expected"
    bound = one_step.run(case, bnfast, tensors)
    assert list(nothing_known.values()) == known, "the second call found none of the first one's launch plans"
    for launch in launches:
        launch._bound, launch._bind_once = None, False
    public = one_step.run(case, bnfast, tensors)
    assert not any(launch._bound for launch in launches)
    assert_same_bits(bound, first, "bound")
    assert_same_bits(public, first, "public")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unaligned_tensors_never_meet_kernels_bound_for_aligned_ones(case: Case, nothing_known: dict) -> None:
    """Same sizes, other addresses: a kernel compiled for 16-byte loads would fault or be wrong. All tensors,
    or x and dy alone, or the parameters alone."""
    tensors = given(case, CUDA)
    for cut in (1, 2, 4, 8):
        for which in ("", "x dy", "weight", "bias", "x dy weight bias running_mean running_var", "dy"):
            moved = {name: shifted(getattr(tensors, name), cut) for name in which.split()}
            other = replace(tensors, **moved)
            verdicts = fp64.judge(case, other, one_step.run(case, bnfast, other))
            assert all(verdict.ok for verdict in verdicts.values()), {n: str(v) for n, v in verdicts.items()}
    unaligned = [launch for launch in launches_of(nothing_known.values()) if not launch._bind_once]
    assert unaligned
    assert not any(launch._bound for launch in unaligned)


@pytest.mark.parametrize("case", [*CASES, instance_norm(SIZE, BF16, tracked=True)], ids=str)
def test_no_step_waits_for_the_gpu(case: Case) -> None:
    """Not for the cumulative average (momentum=None) either, for which torch reads the batch counter."""
    tensors = given(case, CUDA)
    module = one_step.layer(case, bnfast, tensors)
    one_step.step(module, tensors.x, tensors.dy)  # after which it has all it needs
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # what torch then does to wait raises
    try:
        one_step.step(module, tensors.x, tensors.dy)
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
    x = torch.ones(8, device=CUDA)
    on_device(x.neg)  # the first one of a process may come back empty
    seen = on_device(x.neg)
    if len(seen) != 1:
        pytest.skip(f"torch.profiler reports {seen or 'nothing'} for one kernel here")


@every_way
def test_launches(case: Case, forward: Names, backward: Names, profiler_works: None) -> None:
    """BatchNorm and Batch Renormalization: two each way for all that the layer does, counting the batch
    included; eval: one each way. GroupNorm and InstanceNorm: one forward where groups are held, else two; to
    which the backward adds one that sums over samples."""
    tensors = given(case, CUDA)
    module = one_step.layer(case, bnfast, tensors)
    x = tensors.x.detach().requires_grad_()
    leaves = [x, module.weight, module.bias]
    torch.autograd.grad(module(x), leaves, tensors.dy)
    outputs: list[torch.Tensor] = []
    assert on_device(lambda: outputs.append(module(x))) == list(forward)
    assert on_device(lambda: torch.autograd.grad(outputs[0], leaves, tensors.dy)) == list(backward)


def test_launches_without_gradients(profiler_works: None) -> None:
    tensors = given(EVAL, CUDA)
    module = one_step.layer(EVAL, bnfast, tensors)
    with torch.no_grad():
        module(tensors.x)
        assert on_device(lambda: module(tensors.x)) == ["transform_kernel"]


def test_autocast_keeps_the_dtype() -> None:
    module = bnfast.LayerNorm(768, device="cuda")
    x = torch.randn(64, 768, device="cuda", dtype=BF16, requires_grad=True)
    with torch.autocast("cuda", BF16):
        y = module(x)
    assert y.dtype == BF16
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad.dtype, module.weight.grad.dtype) == (BF16, FP32)
