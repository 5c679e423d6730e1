"""Compiled code of the kernels with cells within a sample, and of Batch Renormalization's: as in
test_kernels_static.py."""

from __future__ import annotations

import pytest

from bnfast.kernels import group_plan, one_pass
from bnfast.kernels.epilogue import IDENTITY
from tests.static.test_kernels_static import check_code, variants
from tests.support.compiled import compiled
from tests.support.kernel_cases import ITEMSIZES, Shape, call, compiled_held

pytestmark = pytest.mark.static
SWEPT = [
    Shape(16, 320, 4096, True, 32),  # diffusion networks, channels_last: 10 channels a group
    Shape(2, 2560, 1024, True, 32),
    Shape(1, 512, 16384, True, 32),
    Shape(16, 960, 4096, False, 32),  # contiguous groups too large to hold
    Shape(16, 1920, 1024, False, 32),
    Shape(1, 128, 262144, False, 32),
    Shape(2, 32, 2097152, False, 32),  # volumes: InstanceNorm, and GroupNorm with 8 groups
    Shape(2, 32, 2097152, True, 32),
    Shape(1, 64, 262144, True, 8),
    Shape(64, 256, 196, True, 0, True),
    Shape(64, 256, 3136, False, 0, True),
]
HELD = [
    (16, 32, 10, 4096),  # samples, groups, channels a group, positions: 80 KB
    (16, 32, 20, 1024),
    (16, 32, 10, 1024),
    (16, 32, 40, 64),
    (16, 32, 80, 64),
    (2, 512, 1, 49),
    (2, 320, 1, 64),
    (2, 32, 16, 196),
    (32, 32, 2, 2048),
]


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    variants(SWEPT, ("bf16",)) + variants([SWEPT[0], SWEPT[3]], ("fp32",)),
    ids=str,
)
def test_swept_cells(kind: str, shape: Shape, dtype: str) -> None:
    check_code(kind, shape, dtype)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize(("kind", "shape", "dtype"), variants([SWEPT[0], SWEPT[3]], ("bf16",)), ids=str)
def test_other_targets(kind: str, shape: Shape, dtype: str, target: str) -> None:
    assert compiled(call(kind, shape, dtype), target).spills == 0


def held() -> list[tuple[group_plan.OnePassPlan, int, str]]:
    """What of HELD a program holds, forward (1) and backward (2); the rest is swept twice."""
    cases = [(size, inputs, dtype) for size in HELD for inputs in (1, 2) for dtype in ("bf16", "fp32")]
    sweeps = [(group_plan.plan_one_pass(*s, ITEMSIZES[d], True, i), i, d) for s, i, d in cases]
    return [(sweep, inputs, dtype) for sweep, inputs, dtype in sweeps if sweep is not None]


@pytest.mark.parametrize(("sweep", "inputs", "dtype"), held(), ids=str)
def test_held_cells(sweep: group_plan.OnePassPlan, inputs: int, dtype: str) -> None:
    """All that a program holds is loaded before any of it is used, in whole vectors where sizes allow it."""
    kernel = one_pass.group_norm_kernel if inputs == 1 else one_pass.group_norm_gradients_kernel
    constexprs = {"T": sweep.tile, "ACT": IDENTITY}
    absent = {"residual_ptr", "relu_mask_ptr", "dresidual_ptr"} | ({"bias_ptr"} if inputs == 2 else set())
    report = compiled_held(kernel, constexprs, absent, dtype, sweep.warps, sweep.registers)
    assert report.spills == 0
    assert report.registers <= sweep.registers
    assert report.loads.get(sweep.tile.vec * ITEMSIZES[dtype], 0) >= inputs * sweep.tile.tiles
    assert report.stores.get(sweep.tile.vec * ITEMSIZES[dtype], 0) >= sweep.tile.tiles


def test_what_is_held() -> None:
    """Forward, groups of up to 64 KB are read once; backward, x and dy of up to 32 KB each."""
    for positions in (64, 256, 1024, 4096):
        for kilobytes, inputs in ((64, 1), (32, 2)):
            group = kilobytes * 1024 // 2 // positions
            assert group_plan.plan_one_pass(2, 4, group, positions, 2, True, inputs) is not None
            assert group_plan.plan_one_pass(2, 4, 4 * group, positions, 2, True, inputs) is None
