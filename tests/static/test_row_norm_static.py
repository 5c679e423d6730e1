"""The row kernels as machine code: no spills, whole vectors, registers as planned, enough bytes in flight.

No GPU is involved. Shapes that compile to the same code are compiled once.
"""

from __future__ import annotations

import pytest

from bnfast import dispatch
from bnfast.kernels import row_norm, row_plan
from codegen.sass import bytes_in_flight_per_sm
from tests.support.compiled import compiled
from tests.support.row_cases import ITEMSIZES, SMS, call, sized

pytestmark = pytest.mark.static

ROWS = 65536
# of transformers, and the widest that are held: 28672 forward, 12288 backward
WIDTHS = (64, 256, 384, 512, 768, 1000, 1024, 1280, 1536, 2048, 3072, 4096, 5120, 8192, 12288, 16384, 28672)
OTHER_WIDTHS = {"fp16": (768, 4096), "fp32": (256, 768, 1024, 8192, 16384), "fp64": (256, 768, 4096, 8192)}
LONG = {"bf16": 50000, "fp32": 20000, "fp64": 16384}


def distinct(cases: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """One case for each piece of code that these need."""
    seen: dict[tuple[object, ...], tuple[str, int, str]] = {}
    for kind, width, dtype in cases:
        c = call(kind, ROWS, width, dtype)
        if c is not None:
            seen.setdefault(c.variant, (kind, width, dtype))
    return list(seen.values())


VECTORS = distinct(
    [(kind, width, "bf16") for kind in ("forward", "gradients") for width in WIDTHS]
    + [(k, w, d) for d, widths in OTHER_WIDTHS.items() for w in widths for k in ("forward", "gradients")]
    + [(k, w, d) for d, w in LONG.items() for k in ("forward", "column_gradients", "wide_gradients")]
    + [("column_gradients", 768, d) for d in ITEMSIZES]
)


@pytest.mark.parametrize(("kind", "width", "dtype"), VECTORS, ids=str)
def test_whole_vectors_and_no_spills(kind: str, width: int, dtype: str) -> None:
    c = call(kind, ROWS, width, dtype)
    assert c is not None
    report = compiled(c)
    assert (report.spills, report.stack) == (0, 0)
    assert report.registers <= c.sweep.registers
    assert c.sweep.vec * ITEMSIZES[dtype] == 16
    # the statistics of rows, where they are read again, are single numbers; nothing else is
    loads = report.main_loop_loads or report.loads
    assert loads[16] >= c.sweep.loads
    accumulator = 8 if dtype == "fp64" else 4
    again = kind in ("gradients", "column_gradients")
    assert set(loads) <= ({16, accumulator} if again else {16}), loads
    if kind != "column_gradients":
        once = c.kernel is row_norm.row_norm_kernel  # the others read twice as much as they store a step
        assert report.stores.get(16, 0) >= c.sweep.loads // (1 if once else 2)


SHORT = distinct(
    [(kind, width, "bf16") for kind in ("forward", "gradients") for width in (1, 3, 7, 100, 1001)]
    + [(k, 100001, d) for d in LONG for k in ("forward", "column_gradients", "wide_gradients")]
    + [(k, 1001, d) for k in ("forward", "gradients") for d in ("fp32", "fp64")]
    + [("column_sums", width, d) for width in (7, 768, 100001) for d in ("bf16", "fp64")]
)


@pytest.mark.parametrize(("kind", "width", "dtype"), SHORT, ids=str)
def test_other_sizes_do_not_spill(kind: str, width: int, dtype: str) -> None:
    c = call(kind, ROWS, width, dtype)
    assert c is not None
    report = compiled(c)
    assert (report.spills, report.stack) == (0, 0)
    assert report.registers <= c.sweep.registers


@pytest.mark.parametrize("wanted", ["", "w", "b"])
@pytest.mark.parametrize("width", [768, 50000])
def test_gradients_that_are_not_wanted(width: int, wanted: str) -> None:
    """Leaving some out takes no more registers, and the loads stay whole vectors."""
    kind = "gradients" if width == 768 else "column_gradients"
    c = call(kind, ROWS, width, "bf16", wanted=wanted)
    assert c is not None
    report = compiled(c)
    assert (report.spills, report.stack) == (0, 0)
    assert report.loads.get(16, 0) >= c.sweep.loads


@pytest.mark.parametrize("kind", ["forward", "gradients"])
@pytest.mark.parametrize("parameters", ["bf16", "fp64"])
def test_parameters_of_another_dtype(kind: str, parameters: str) -> None:
    for width in (768, 4096):
        c = call(kind, ROWS, width, "bf16", parameters)
        assert c is not None
        report = compiled(c)
        assert set(report.main_loop_loads or report.loads) <= {16, 4}
        assert parameters == "fp64" or (report.spills, report.stack) == (0, 0)  # nobody trains so


# Bytes a thread that Triton keeps in memory on sm_100, for want of two registers (3.7.1, 3.9.0) or of four
# (3.8.0). Fewer rows under way would cure it, and halve what is in flight, everywhere.
LACKING = {("gradients", 8192): 8}
if str(dispatch.TRITON_VERSION).startswith("3.8."):
    LACKING = {("gradients", 8192): 16, ("column_gradients", 50000): 8}


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    ("kind", "width"),
    [("forward", 768), ("forward", 4096), ("forward", 28672), ("forward", 50000), ("gradients", 768)]
    + [("gradients", 4096), ("gradients", 12288), ("column_gradients", 50000), ("wide_gradients", 50000)]
    + [("column_sums", 768), ("gradients", 8192)],
    ids=str,
)
def test_other_gpus(kind: str, width: int, target: str) -> None:
    c = call(kind, ROWS, width, "bf16")
    assert c is not None
    report = compiled(c, target)
    assert report.stack <= (LACKING.get((kind, width), 0) if target == "sm_100" else 0)
    assert kind == "column_sums" or report.loads.get(16, 0) > 0


IN_FLIGHT = distinct([(k, w, d) for k, w, d in VECTORS if d in ("bf16", "fp32") and w >= 256])
LEAST = {"forward": 40, "gradients": 32, "column_gradients": 48, "wide_gradients": 48}  # KB an SM


@pytest.mark.parametrize(("kind", "width", "dtype"), IN_FLIGHT, ids=str)
def test_bytes_in_flight(kind: str, width: int, dtype: str) -> None:
    """Of x and dy alone, as planned: gamma and beta come from L1, and rows' statistics are a few bytes."""
    c = call(kind, ROWS, width, dtype)
    assert c is not None
    report = compiled(c)
    assert report.bytes_in_flight is not None
    assert report.bytes_in_flight >= c.sweep.loads * 16
    share = c.sweep.loads * 16 / report.bytes_in_flight
    assert bytes_in_flight_per_sm(report, c.sweep.programs / SMS) * share >= LEAST[kind] * 1024


def test_which_rows_are_held() -> None:
    """One read of x up to 64 KB a row (56 KB of 16-bit numbers); of dy and x up to 32 KB each (24 KB)."""
    for dtype, itemsize in ITEMSIZES.items():
        most = (57344 if itemsize == 2 else 65536) // itemsize
        assert row_plan.forward(sized(ROWS, most, dtype))[0] == "held"
        assert row_plan.forward(sized(ROWS, most + 16, dtype))[0] == "long"
        most = (24576 if itemsize == 2 else 32768) // itemsize
        assert row_plan.gradients(sized(ROWS, most, dtype)) is not None
        assert row_plan.gradients(sized(ROWS, most + 16, dtype)) is None
