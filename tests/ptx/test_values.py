"""Numbers at the edges of what instructions take and give: halves, zeros, far numbers, and moved results."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.test_opcodes import bits, run
from tests.support.ptx_kernels import LANES, kernel, launch

pytestmark = pytest.mark.usefixtures("executor")


def test_every_half() -> None:
    """And what lies between two of them, a tie among others, rounded to the nearest even one."""
    halves = np.arange(2**16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        floats = halves.view(np.float16).astype(np.float32)
        after = np.roll(floats, -1)
        given = np.concatenate([floats, (floats + after) / 2, floats * 0.7 + after * 0.3, floats * 1e-3])
        wanted = given.astype(np.float16)
    found = np.zeros(len(given), np.uint32)
    body = """
        mad.lo.u32 %r1, %ctaid.x, 32, %r0;
        mad.wide.u32 %rd10, %r1, 4, %rd0;
        mad.wide.u32 %rd11, %r1, 4, %rd1;
        ld.global.b32 %r2, [%rd10];
        cvt.rn.f16.f32 %rs1, %r2;
        cvt.f32.f16 %r3, %rs1;
        st.global.b32 [%rd11], %r3;
    """
    launch(kernel(body, 2), given.view(np.uint32), found, grid=len(given) // LANES)
    np.testing.assert_array_equal(found.view(np.float32), wanted.astype(np.float32))
    assert (np.signbit(found.view(np.float32)) == np.signbit(wanted))[~np.isnan(wanted)].all()


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_zero_is_more_than_minus_zero(kind: str) -> None:
    minus = np.uint64(bits(-0.0, kind))
    zeros = np.array([0, minus] * 16, np.uint64)
    assert (run(f"max.{kind}", [zeros, zeros[::-1].copy()]) == 0).all()
    assert (run(f"min.{kind}", [zeros, zeros[::-1].copy()]) == minus).all()


@pytest.mark.parametrize(
    ("opcode", "kind"), [("rzi.s32.f32", "f32"), ("rni.s32.f32", "f32"), ("rni.s32.f64", "f64")]
)
def test_numbers_beyond_32_bits_become_the_nearest(opcode: str, kind: str) -> None:
    far = {float("nan"): 0, 1e10: 2**31 - 1, float("inf"): 2**31 - 1, -1e10: 2**31, -float("inf"): 2**31}
    given = np.array([bits(each, kind) for each in (*far, *[1.0] * 27)], np.uint64)
    assert run(f"cvt.{opcode}", [given]).tolist() == [*far.values(), *[1] * 27]


def test_what_is_moved_stays_finite() -> None:
    given = np.array([bits(each, "f32") for each in (-149.0, -148.5, 127.99999, -126.2)] * 8, np.uint64)
    for perturb in range(1, 20):
        found = run("ex2.approx.f32", [given], perturb=perturb).astype(np.uint32).view(np.float32)
        assert np.isfinite(found).all()
        assert (found >= 0).all()
