"""What the kernels owe whatever the norm: they give the same bits in any order of their programs, compute
what is wanted, and keep a bad value where it belongs. On compiled PTX, where each launch is executed in
several orders, and on a GPU with larger shapes."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator

import pytest
import torch
from triton.runtime.jit import JITFunction

import bnfast
from bnfast import exact
from bnfast.checks import fp64, one_step
from bnfast.checks.cases import Case, batch_renorm, given, group_norm, instance_norm, layer_norm
from bnfast.kernels import launch, launch_plan
from bnfast.ptx import Execution
from tests.support.buffers import assert_same_bits, bit_identical, nan_filled_allocations
from tests.support.families import BF16, FP16, FP32, FP64, layouts, on_gpu
from tests.support.kernel_calls import kernel_names

pytestmark = pytest.mark.compiled

# every view: packed, odd sizes, channels in pieces; groups and rows in one pass and in two
ORDINARY = [
    *layouts(
        Case((8, 24, 7, 7)), Case((6, 13, 3, 4)), Case((2, 3, 70, 66)), Case((1, 1, 4, 5), tracked=False)
    ),
    *layouts(Case((5, 13, 3, 4), tracked=False)),
    group_norm((3, 12, 5, 5), groups=3),
    group_norm((9, 16, 2, 2), groups=8),
    group_norm((1, 2, 160, 160), groups=1),
    group_norm((2, 40, 5, 5), FP32, True, groups=4),
    group_norm((2, 130, 4, 3), FP32, True, groups=2),
    instance_norm((2, 12, 5, 5), FP32, True),
    *map(layer_norm, ((5, 7), (33, 64), (3, 1000), (9, 1024), (2, 8201))),
]
SIZE = (8, 24, 14, 14)
LARGER = [
    Case(SIZE, BF16),
    Case(SIZE, BF16, training=False),
    batch_renorm(SIZE, BF16),
    *layouts(group_norm(SIZE, BF16, groups=4), instance_norm(SIZE, BF16)),
    group_norm((1, 4, 256, 256), BF16, groups=2),
    layer_norm((130, 768), BF16),
    layer_norm((130, 20000), BF16),
]
ORDERED = [
    *layouts(Case((16, 24, 7, 7)), Case((6, 13, 3, 4)), Case((2, 3, 70, 66))),
    *(case for case in ORDINARY if case.layer in ("GroupNorm", "InstanceNorm")),
    *(layer_norm(shape, BF16) for shape in ((300, 64), (40, 1000), (6, 8201))),
]
# the channels of each are split over many programs
SPLIT = [
    *layouts(Case((32, 64, 56, 56), BF16)),
    Case((1, 1, 1 << 21), FP32),
    Case((100_000, 24), FP32),
    Case((4096, 65, 7, 7), FP16),
    Case((64, 3, 101, 103), FP32, channels_last=True),
    Case((64, 24, 50), FP64),
    Case((64, 64, 28, 28), BF16, training=False),
    *layouts(
        batch_renorm((32, 64, 56, 56), BF16),
        instance_norm((2, 32, 64, 64, 64), FP32),
        group_norm((2, 64, 256, 256), BF16, groups=8),
        group_norm((16, 960, 17, 17), FP16, groups=32),
        group_norm((64, 30, 28, 28), FP32, groups=3),
    ),
    *(layer_norm((2051, width), BF16) for width in (768, 4096, 20000)),
]


# whose steps launch every kernel but that of LayerNorm's activation
COVERING = [
    Case((8, 24, 7, 7), FP16),
    group_norm((3, 12, 5, 5), FP16, groups=3),
    group_norm((3, 12, 5, 5), FP16, True, groups=3),
    layer_norm((7, 768), FP16),
    layer_norm((2, 8201)),
]


@contextlib.contextmanager
def noise() -> Iterator[None]:
    """Other work on the GPU meanwhile, of no fixed rhythm: it shuffles which programs run when."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        a = torch.randn(2048, 2048, device="cuda")
        for _ in range(40):
            a = (a @ a).clamp(-1, 1)
    yield
    stream.synchronize()


def forget_everything() -> None:
    """Plans, counters and compiled kernels: all that is cached between calls."""
    launch_plan.forget_plans()
    launch._workspaces.clear()
    kernels = [module for name, module in sys.modules.items() if name.startswith("bnfast.kernels.")]
    for module in kernels:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()
            elif hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("case", [*ORDERED, *on_gpu(SPLIT)], ids=str)
def test_same_bits_in_any_order(case: Case, device: torch.device) -> None:
    """Whichever program arrives last, the partials are merged in the same order. Nor has anything that is
    cached between calls a say in the result."""
    g = given(case, device)
    first = one_step.run(case, bnfast, g)
    for number in range(20 if device.type == "cuda" else 1):
        with noise() if device.type == "cuda" else contextlib.nullcontext():
            assert_same_bits(one_step.run(case, bnfast, g), first, f"at repetition {number}")
    forget_everything()
    for _ in range(2):  # on a GPU the first compiles and binds, the second runs what was bound
        assert_same_bits(one_step.run(case, bnfast, g), first, "after the caches were cleared")


@pytest.mark.usefixtures("several_programs")
def test_every_kernel_is_executed(executed: list[Execution]) -> None:
    """In one test, which no sample of cases leaves out; test_numerics.py judges the results."""
    for case in COVERING:
        one_step.run(case, bnfast, given(case, torch.device("cpu")))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bnfast.LayerNorm(64, activation="relu")(x).sum().backward()
    assert {each.kernel for each in executed} == kernel_names()


@pytest.mark.parametrize("case", [*ORDINARY, *on_gpu(LARGER)], ids=str)
def test_only_what_is_wanted(case: Case, device: torch.device) -> None:
    """Leaving gradients out takes other kernels, which compute the rest as well as ever."""
    g = given(case, device)
    expected = fp64.expectations(case, g)
    for wanted in list(itertools.product((True, False), repeat=3))[1:-1]:  # neither all nor none
        module = one_step.layer(case, bnfast, g)
        leaves = {"dx": g.x.detach(), "dweight": module.weight, "dbias": module.bias}
        for leaf, want in zip(leaves.values(), wanted, strict=True):
            leaf.requires_grad_(want)
        chosen = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        with nan_filled_allocations():
            gradients = torch.autograd.grad(module(leaves["dx"]), list(chosen.values()), g.dy)
        for name, gradient in zip(chosen, gradients, strict=True):
            ratio = exact.error_ratio(gradient, expected[name], exact.accumulator(case.dtype))
            assert ratio <= 1, (name, wanted)


SPOILT = [
    *layouts(Case((6, 10, 5, 5)), batch_renorm((6, 10, 5, 5)), group_norm((2, 12, 4, 4), groups=3)),
    layer_norm((3, 50)),
    layer_norm((3, 8201)),
]
SPOILT_ON_GPU = layouts(
    *map(Case, ((32, 65), (8, 65, 7, 7), (8, 64, 14, 14), (4, 6, 100, 100))),
    batch_renorm((6, 24, 14, 14)),
    group_norm((4, 24, 14, 14), groups=6),
    group_norm((4, 130, 7, 7), BF16, groups=2),
    group_norm((2, 8, 200, 200), groups=2),
    group_norm((300, 24, 2, 2), FP64, groups=6),
    layer_norm((130, 768)),
)


def sharing(case: Case) -> tuple[int | slice, ...]:
    """Of x, what shares statistics with the middle channel of the last sample."""
    channel = case.channels // 2
    if case.in_sample:
        size = case.channels // case.in_sample
        return -1, slice(channel // size * size, (channel // size + 1) * size)
    return (-1,) if case.layer == "LayerNorm" else (slice(None), channel)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("case", [*SPOILT, *on_gpu(SPOILT_ON_GPU)], ids=str)
def test_one_bad_value_stays_where_it_belongs(case: Case, bad: float, device: torch.device) -> None:
    """It shows in all of its channel, of its sample's group, or of its row, and nowhere else. Running
    statistics of a Batch Renormalization do not remember it: under loss scaling the step is thrown away."""
    g, clean = given(case, device), given(case, device)
    g.x[(-1, case.channels // 2, *[-1] * (g.x.dim() - 2))] = bad
    expected, found = one_step.run(case, bnfast, clean), one_step.run(case, bnfast, g)
    spoilt = torch.zeros(case.shape, dtype=torch.bool, device=device)
    spoilt[sharing(case)] = True
    for name in ("y", "dx"):
        assert not found[name][spoilt].isfinite().any(), name
        assert bit_identical(found[name][~spoilt], expected[name][~spoilt]), name
    channels = spoilt.movedim(-1 if case.layer == "LayerNorm" else 1, 0).flatten(1).any(1)
    for name in found.keys() & {"dweight", "running_mean", "running_var"}:
        assert bit_identical(found[name][~channels], expected[name][~channels]), f"{name} of other channels"
        if case.layer == "BatchRenorm" and name != "dweight":
            assert bit_identical(found[name], torch.where(channels, getattr(g, name), expected[name])), name
        else:
            assert not found[name][channels].isfinite().any(), name
