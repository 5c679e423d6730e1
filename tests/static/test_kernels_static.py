"""The kernels as machine code: no spills, whole vectors, registers as planned, enough bytes in flight, a
short epilogue.

A case is a layer. What it launches is recorded without a GPU, with the code that Triton compiles for it; code
that several cases share is compiled once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import bnfast
from benchmarks import machine
from bnfast import dispatch
from bnfast.activation import NAMES
from bnfast.kernels import batch_norm, group_plan, layer_norm, row_plan
from bnfast.kernels.records import LayerNormOptions, OnePassTile, Wanted
from codegen import SMS, launches, sass
from codegen.cases import BF16, BOTH, FP32, LAST, Case, layers
from codegen.launches import Launched

pytestmark = pytest.mark.static

FP16, FP64 = torch.float16, torch.float64
DTYPES = (FP16, BF16, FP32, FP64)
STREAMED = ("x_ptr", "dy_ptr", "residual_ptr")  # what may be read that is as large as x
WRITTEN = ("y_ptr", "dx_ptr", "dresidual_ptr")
# These read statistics of rows, single numbers, in their main loops.
BY_ROW = ("row_gradients_kernel", "column_gradients_kernel", "row_activation_kernel")
WHOLE = ("batch_norm_kernel", "batch_norm_gradients_kernel")  # whose programs have whole channels


def recorded(case: Case, target: str = "sm_90") -> list[Launched]:
    """What a case launches, forward and backward."""
    return list(itertools.chain(*launches.of_case(case, target=target).values()))


def given(each: Launched, names: tuple[str, ...]) -> list[Tensor]:
    return [each.arguments[name] for name in names if each.arguments.get(name) is not None]


def planned_loads(each: Launched) -> int:
    """Vectors of one input that a thread is to have under way at a time."""
    tile, threads = each.arguments["T"], 32 * each.code.metadata.num_warps
    if isinstance(tile, OnePassTile):
        return tile.tiles * tile.rows // threads
    return tile.unroll * tile.rows * tile.lanes * getattr(tile, "parts", 1) // (tile.vec * threads)


def odd_planes(each: Launched) -> bool:
    """Whether the planes of a program's channels end where no vector twice as wide as its own does."""
    if each.kernel not in WHOLE or each.arguments["T"].mode != "nchw_packed":
        return False
    return bool(each.arguments["width_v"] % 2 or each.arguments["pitch_v"] % 2)


def check(each: Launched, whole: bool = True) -> None:
    """whole: whether sizes allow vectors of 16 bytes, of which a kernel then has to make use."""
    report, kernel, tile = each.report, each.kernel, each.arguments["T"]
    assert report.spills == 0, kernel
    assert report.registers <= each.code.metadata.maxnreg, kernel
    read, planned = given(each, STREAMED), planned_loads(each)
    if not read or not whole:
        return
    width, loads = tile.vec * read[0].itemsize, report.streamed
    assert loads[width] >= len(read) * planned, (kernel, loads)
    if given(each, WRITTEN):  # the second loop over a long row is half as wide as the first
        assert report.stores[width] >= planned // (1 + (kernel == "long_row_norm_kernel")), kernel
    if isinstance(tile, OnePassTile):  # parameters are among its loads
        return
    assert width == 16 or odd_planes(each), f"{kernel}: the plan gives up whole vectors"
    if kernel in WHOLE and tile.held:  # without a loop, what it loads of channels is among its loads
        return
    if kernel in WHOLE:  # the first tile, those that follow, and all of them again, as wide each time
        again = len(read) - bool(given(each, ("residual_ptr",)))
        assert report.loads[width] >= (2 * again + len(read)) * planned, (kernel, report.loads)
    single = {max(4, read[0].itemsize)} if kernel in BY_ROW else set()
    for mask in given(each, ("relu_mask_ptr",)):
        single = {1 if mask.dtype == torch.uint8 else tile.vec}
    assert set(loads) - single == {width}, (kernel, loads)


# KB that an SM waits for at a time, at least: 48 hide the latency of an H200's memory
LEAST = {"row_norm_kernel": 40, "long_row_norm_kernel": 40, "row_gradients_kernel": 32}
LEAST_ACTIVATED = {"transform_kernel": 47, "gradient_transform_kernel": 35}


def check_in_flight(each: Launched) -> None:
    """Of x, dy and z alone: parameters come from L1, and statistics are a few bytes."""
    in_flight = each.report.code.bytes_in_flight
    if each.kernel == "column_sums_kernel":
        return
    read, tile = given(each, STREAMED), each.arguments["T"]
    width = tile.vec * read[0].itemsize
    planned = width * len(read) * planned_loads(each)
    activated = getattr(each.arguments.get("ACT"), "name", "none") != "none"
    wanted = LEAST | (LEAST_ACTIVATED if activated else {})
    # the last load of a forward with whole channels is issued after the first use [sass]
    assert in_flight >= planned - width * (each.kernel == "batch_norm_kernel") or activated, each.kernel
    share = min(1.0, planned / in_flight)
    assert each.in_flight * share >= 1024 * wanted.get(each.kernel, 48), each.kernel


def check_epilogue(each: Launched) -> None:
    """What a program runs between its loop and its atomic is at most a quarter of its loop."""
    phases, sizes, tile = each.report.code.phases, each.arguments, each.arguments["T"]
    held = {
        "nchw_packed": sizes["width_v"] * tile.vec // sizes["inner"], "nhwc_packed": sizes["channels"],
        "nhwc": tile.lanes, "nchw": 1,
    }[tile.mode]  # fmt: skip
    # folding lanes into channels is a loop of its own
    turns = -(-held // tile.channels_per_iter) if phases.repeated else 1
    epilogue = len(phases.epilogue) + (turns - 1) * len(phases.repeated)
    # the first tile, which is peeled, counts as one turn of the loop
    assert epilogue <= len(phases.main_loop) * sizes["tiles"] / sizes["splits"] / 4, each.kernel


RESNETS = layers(
    "BatchNorm",
    *((n, c, side, side) for n in (256, 64) for c, side in [
        (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
        (512, 14), (512, 7), (2048, 7),
    ]),
    last=BOTH,
)  # fmt: skip
# How much x must hold before a GPU of so many SMs counts as filled: eight rounds of 48 KB for each. Below, a
# program's loop is too short to pay for its epilogue, whatever the plan.
LARGE = [case for case in RESNETS if case.x_bytes >= 8 * SMS * 48 * 1024]
FOLLOWED = layers("BatchNorm", (256, 256, 14, 14), after=["relu", "z + relu"], last=BOTH)
BATCH_NORM = [
    *layers("BatchNorm", (8, 24, 7, 7), (64, 256, 14, 14), dtypes=DTYPES, last=BOTH),
    *layers("BatchNorm", (256, 65, 14, 14), dtypes=DTYPES, last=LAST),
    *layers("BatchNorm", (1, 1, 1000, 1000), dtypes=DTYPES),
    *layers("BatchNorm", (4, 3, 10, 10), (64, 96, 7, 7), last=LAST),
    *layers("BatchNorm", (128, 1000), (2, 32, 64, 64, 64)),
    *layers("BatchNorm", (64, 256, 14, 14), last=BOTH, training=False),
    *layers("BatchRenorm", (64, 256, 14, 14), last=LAST),
    *layers("BatchRenorm", (64, 256, 56, 56)),
    *layers("BatchNorm", (256, 256, 14, 14), after=[*NAMES[1:], "z + gelu"], last=LAST),
    *layers("BatchNorm", (256, 64, 112, 112), after=["relu", "z + relu"]),
    *layers("BatchNorm", (32, 96, 12, 12), after=["hardswish"], last=LAST),
    *layers("BatchNorm", (4, 16, 8, 8), after=["z + relu"], dtypes=[FP64], last=LAST),
    # with bytes of relu's mask
    *layers("BatchNorm", (256, 256, 14, 14), after=["z + relu"], dtypes=[FP32]),
    *layers("BatchNorm", (4, 2048, 7, 7), (32, 512, 14, 14), after=["z + relu"], dtypes=DTYPES),
]
# diffusion networks, where a program holds a group or not, and volumes
GROUPS = [
    *layers("GroupNorm", (16, 320, 64, 64), dtypes=(BF16, FP32), last=BOTH, groups=32),
    *layers("GroupNorm", (2, 2560, 32, 32), (1, 512, 128, 128), last=LAST, groups=32),
    *layers(
        "GroupNorm", (16, 960, 64, 64), (16, 640, 32, 32), (16, 320, 32, 32), (16, 1280, 8, 8),
        (16, 2560, 8, 8), (2, 512, 14, 14), (32, 64, 64, 32), dtypes=(BF16, FP32), groups=32,
    ),
    *layers("GroupNorm", (16, 1920, 32, 32), (1, 128, 512, 512), groups=32),
    *layers("GroupNorm", (1, 64, 64, 64, 64), last=LAST, groups=8),
    *layers("InstanceNorm", (2, 32, 128, 128, 128), last=BOTH),
    *layers("InstanceNorm", (2, 320, 8, 8), dtypes=(BF16, FP32)),
    *layers("GroupNorm", (16, 320, 64, 64), after=["relu", "z + relu"], last=LAST, groups=32),
    *layers("GroupNorm", (1, 128, 512, 512), after=["relu", "z + relu"], groups=32),
    # as many tiles as group_plan.py lets a program hold, forward and backward
    *layers(
        "GroupNorm", (16, 1024, 32, 32), (16, 512, 32, 32),
        after=["relu", "gelu", "z", "z + relu", "z + gelu"], groups=32,
    ),
    *layers("GroupNorm", (16, 1152, 32, 32), (16, 1280, 32, 32), after=["z + relu"], groups=32),
    # a program for each channel of a sample, which reads three tensors
    *layers(
        "GroupNorm", (4, 2048, 7, 7), (2, 2560, 32, 32), after=["z + mish", "z + hardswish"], dtypes=DTYPES,
        groups=32,
    ),
]  # fmt: skip


def rows(*widths: int, dtype: torch.dtype = BF16, after: Iterable[str] = ("",)) -> list[Case]:
    """Enough rows to fill a GPU, and few enough that they could be allocated."""
    shapes = [(min(65536, 2**28 // width), width) for width in widths]
    return layers("LayerNorm", *shapes, after=after, dtypes=[dtype])


# of transformers, and the widest that are held: 28672 forward, 12288 backward; the last ones are long
ROWS = [
    *rows(256, 384, 512, 768, 1000, 1024, 1280, 1536, 2048, 3072, 4096, 5120, 8192, 12288),
    *rows(16384, 28672, 50000),
    *rows(256, 768, 1024, 8192, 16384, 20000, dtype=FP32),
]
OTHER_ROWS = [
    *rows(64), *rows(768, 4096, dtype=FP16), *rows(256, 768, 4096, 8192, 16384, dtype=FP64),
    *rows(64, 768, 8192, 40000, after=["z + relu", "z + gelu"]),
]  # fmt: skip
# sizes that forbid whole vectors, with which kernels still must not spill
NARROW = [
    *layers("BatchNorm", (64, 3, 35, 35), (3, 7, 11)), *layers("BatchNorm", (32, 1001, 4, 4), last=LAST),
    *layers("InstanceNorm", (2, 512, 7, 7), dtypes=(BF16, FP32)),
    *rows(1, 3, 7, 100, 1001, 100001), *rows(1001, 100001, dtype=FP32), *rows(7, 1001, 100001, dtype=FP64),
]  # fmt: skip
EVERY = RESNETS + FOLLOWED + BATCH_NORM + GROUPS + ROWS + OTHER_ROWS + NARROW


def test_enough_shapes_count_as_large() -> None:
    """The large ones are most of what ResNet-50 moves at batch 256, and about half at 64."""
    for n, share in ((256, 0.85), (64, 0.45)):
        large, every = (sum(c.x_bytes for c in cases if c.shape[0] == n) for cases in (LARGE, RESNETS))
        assert large >= share * every


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_layers(case: Case) -> None:
    for each in recorded(case):
        check(each, whole=case not in NARROW)
        if case in LARGE + FOLLOWED + ROWS:
            check_in_flight(each)
        if case in LARGE and each.kernel in ("statistics_kernel", "gradient_sums_kernel"):
            check_epilogue(each)


@pytest.mark.parametrize("case", [GROUPS[-1], FOLLOWED[1], ROWS[0]], ids=str)
def test_without_a_backward(case: Case) -> None:
    """There is no mask to write, and no table of rows."""
    with torch.no_grad(), launches.recording() as found:
        launches.layer_of(case)(*(case.empty() for _ in range(1 + case.residual)))
    for each in found:
        check(each)


@pytest.mark.parametrize("last", BOTH, ids=["channels_last", "contiguous"])
def test_moments(last: bool) -> None:
    """The reduction that stops at the moments is as tight as BatchNorm's."""
    (case,) = layers("BatchNorm", (256, 64, 56, 56), last=[last])
    with launches.recording() as found:
        batch_norm.moments(case.empty())
    (launched,) = found
    check(launched)


@pytest.mark.parametrize(
    ("width", "wanted", "dtype"),
    [(width, Wanted(True, *some), BF16) for width in (768, 50000) for some in ((None, FP32), (FP32, None))]
    + [(width, Wanted(True, None, None), BF16) for width in (768, 50000)]
    + [(768, Wanted(False, FP32, FP32), dtype) for dtype in DTYPES],
    ids=str,
)
def test_gradients_that_are_not_wanted(width: int, wanted: Wanted, dtype: torch.dtype) -> None:
    """Leaving some out takes no more registers, and the loads stay whole vectors."""
    (case,) = rows(width, dtype=dtype)
    x = case.empty()
    table = torch.empty(2, len(x), dtype=FP64 if dtype == FP64 else FP32)
    with launches.recording() as found:
        options = LayerNormOptions((width,), 1e-5)
        layer_norm.backward(x, x, table, torch.empty(width), None, options, wanted)
    for each in found:
        check(each)
        if not wanted.dx and dtype in (BF16, FP32):
            check_in_flight(each)


@pytest.mark.parametrize("width", [768, 4096])
@pytest.mark.parametrize("parameters", [BF16, FP64], ids=str)
def test_parameters_of_another_dtype(width: int, parameters: torch.dtype) -> None:
    (case,) = rows(width)
    x, layer = case.empty().requires_grad_(), bnfast.LayerNorm(width, dtype=parameters)
    with launches.recording() as found:
        torch.autograd.grad(layer(x), (x, *layer.parameters()), x)
    for each in found[:2]:
        assert set(each.report.streamed) <= {16, 4}
        assert parameters == FP64 or each.report.spills == 0  # nobody trains so


# Bytes a thread that Triton keeps in memory on sm_100, for want of two registers (3.7.1, 3.9.0) or of four
# (3.8.0). Fewer rows under way would cure it, and halve what is in flight, everywhere.
LACKING = {("row_gradients_kernel", 8192): 8}
if str(dispatch.TRITON_VERSION).startswith("3.8."):
    LACKING = {("row_gradients_kernel", 8192): 16, ("column_gradients_kernel", 50000): 8}
ELSEWHERE = [
    *layers("BatchNorm", (64, 256, 14, 14), last=BOTH), *layers("BatchNorm", (256, 65, 14, 14), last=LAST),
    *layers("BatchNorm", (1, 1, 1000, 1000)), FOLLOWED[0],
    *layers("GroupNorm", (16, 960, 64, 64), last=BOTH, groups=32),
    *rows(768, 4096, 8192, 12288, 28672, 50000),
]  # fmt: skip


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("case", ELSEWHERE, ids=str)
def test_other_gpus(case: Case, target: str) -> None:
    for each in recorded(case, target):
        report = each.report
        lacking = LACKING.get((each.kernel, case.shape[1]), 0) if target == "sm_100" else 0
        assert report.stack <= lacking, each.kernel
        assert report.spilling == 0 or lacking, each.kernel
        read = given(each, STREAMED)
        width = each.arguments["T"].vec * read[0].itemsize if read and odd_planes(each) else 16
        assert report.loads[width] > 0 or not read, each.kernel


def test_the_copy_that_bandwidth_is_measured_by() -> None:
    """As launched for buffers whose addresses and sizes are multiples of 16: twice the bytes in flight that
    hide the latency of an H200's memory."""
    x = torch.empty(1024)
    report = sass.compile_kernel(machine.copy_kernel, x, x, 1024, TILE=machine.TILE)
    assert report.spills == 0
    assert report.loads == report.stores == {16: machine.TILE * 4 // 16 // 128}  # by four warps
    assert sass.bytes_in_flight_per_sm(report, 1000) >= 96 * 1024


def test_which_groups_are_held() -> None:
    """Forward, groups of up to 80 KB are read once; backward, x and dy of up to 40 KB each."""
    for positions, (kilobytes, inputs) in itertools.product((64, 256, 1024, 4096), ((80, 1), (40, 2))):
        group = kilobytes * 1024 // 2 // positions
        assert group_plan.plan_one_pass(2, 4, group, positions, 2, True, inputs) is not None
        assert group_plan.plan_one_pass(2, 4, 4 * group, positions, 2, True, inputs) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_which_rows_are_held(dtype: torch.dtype) -> None:
    """One read of x up to 64 KB a row (56 KB of 16-bit numbers); of dy and x up to 32 KB each (24 KB)."""
    for kilobytes, read_once in (
        (64 if dtype.itemsize > 2 else 56, lambda size: row_plan.forward(size)[0] == "one_pass"),
        (32 if dtype.itemsize > 2 else 24, lambda size: row_plan.gradients(size) is not None),
    ):
        most = kilobytes * 1024 // dtype.itemsize
        for width in (most, most + 16):
            assert read_once(row_plan.Rows(65536, width, dtype.itemsize, True, SMS)) is (width == most)
