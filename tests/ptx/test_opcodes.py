"""What the executor computes for each instruction, against Python's integers and numpy's floats."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from bnfast.ptx.execute import Fault
from bnfast.ptx.program import CODES
from tests.support.ptx_kernels import LANES, kernel, launch

pytestmark = pytest.mark.usefixtures("executor")

WIDTHS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}
FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
EDGES = [
    0, 1, 2, 31, 32, 63, 64, 127, 128, 255, 32767, 32768, 65535, 2**31 - 1,
    2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1,
]  # fmt: skip


def width(kind: str) -> int:
    return 1 if kind == "pred" else int(kind.strip("bfus"))


def bits_of(kind: str, generator: np.random.Generator) -> np.ndarray:
    """A lane's worth of operands of this type, as 64-bit integers: the edges first, then random ones."""
    if kind in FLOATS or kind == "bf16":
        special = [0.0, -0.0, 1.0, -1.5, 0.5, 2.5, 3.0, -7.25, np.inf, -np.inf, np.nan, 1e-3, 100.0]
        values = np.array([*special, *generator.normal(0, 8, LANES - len(special))])
        if kind == "bf16":
            return values.astype(np.float32).view(np.uint32).astype(np.uint64) >> np.uint64(16)
        made = values.astype(FLOATS[kind])
        return made.view(f"u{made.itemsize}").astype(np.uint64)
    random = [int(v) for v in generator.integers(0, 2**63, LANES - len(EDGES))]
    return np.array([v % 2 ** width(kind) for v in [*EDGES, *random]], np.uint64)


def value(bits: int, kind: str) -> Any:
    """The number that these bits are."""
    bits = int(bits)
    if kind == "bf16":
        return np.uint32(bits << 16).view(np.float32)
    if kind in FLOATS:
        return np.dtype(f"u{width(kind) // 8}").type(bits).view(FLOATS[kind])
    if kind.startswith("s") and bits >> (width(kind) - 1):
        return bits - 2 ** width(kind)
    return bits


def bits(number: Any, kind: str) -> int:
    if kind == "bf16":
        x = int(np.float32(number).view(np.uint32))
        return 0x7FFF if np.isnan(number) else (x + 0x7FFF + (x >> 16 & 1)) >> 16
    if kind in FLOATS:
        made = FLOATS[kind](number)
        return 0x7FFF if kind == "f16" and np.isnan(made) else int(made.view(f"u{made.itemsize}"))
    return int(number) % 2 ** width(kind)


def truncated(function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """Of C: towards zero."""
    return lambda a, b: function(abs(a), abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def divided(a: int, b: int) -> int:
    return truncated(operator.floordiv)(a, b) if b else -1


def remainder(a: int, b: int) -> int:
    return a - b * truncated(operator.floordiv)(a, b) if b else a


def field(kind: str) -> Callable[[int, int, int], int]:
    def take(a: int, start: int, length: int) -> int:
        start, length, whole = start & 255, length & 255, width(kind)
        if not length:
            return 0
        top = min(start + length - 1, whole - 1)
        taken = [a >> k & 1 for k in range(start, top + 1)]
        sign = (a >> top & 1) if kind.startswith("s") else 0
        return sum(bit << k for k, bit in enumerate(taken + [sign] * (whole - len(taken))))

    return take


def shifted(kind: str) -> Callable[[int, int], int]:
    return lambda a, n: a >> min(n, width(kind)) if n < 2**32 else 0


def permuted(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    chosen = [selector >> 4 * k & 15 for k in range(4)]
    return int.from_bytes(
        bytes(source[c & 7] if c < 8 else 255 * (source[c & 7] >> 7) for c in chosen), "little"
    )


I32, I64 = ("s32", "u32"), ("s64", "u64")
# the instruction: its function of the operands' values, the types of the operands, and that of the result
TABLE: dict[str, tuple[Callable[..., Any], str, str]] = {}


def add(opcode: str, function: Callable[..., Any], takes: str = "", gives: str = "") -> None:
    kind = opcode.split(".")[-1]
    TABLE[opcode] = function, takes or kind, gives or kind


for kind in ("s16", *I32, *I64):
    add(f"add.{kind}", operator.add)
for kind in (*I32, *I64):
    add(f"sub.{kind}", operator.sub)
    add(f"mul.lo.{kind}", operator.mul)
    add(f"mad.lo.{kind}", lambda a, b, c: a * b + c)
    add(f"div.{kind}", divided)
    add(f"rem.{kind}", remainder)
    add(f"min.{kind}", min)
    add(f"max.{kind}", max)
    add(f"bfe.{kind}", field(kind), f"b{width(kind)} u32 u32")
for kind in ("s16", "u16"):
    add(f"sub.{kind}", operator.sub)
    add(f"mul.lo.{kind}", operator.mul)
    add(f"mul.hi.{kind}", lambda a, b: a * b >> 16)
    add(f"mul.wide.{kind}", operator.mul, kind, "b32")
    add(f"mad.lo.{kind}", lambda a, b, c: a * b + c)
    add(f"mad.wide.{kind}", lambda a, b, c: a * b + c, f"{kind} {kind} b32", "b32")
add("add.s16x2", lambda a, b: (a + b) % 2**16 + ((a >> 16) + (b >> 16) << 16), "b32", "b32")
for kind in ("s32", "u32"):
    add(f"mul.wide.{kind}", operator.mul, kind, "b64")
    add(f"mad.wide.{kind}", lambda a, b, c: a * b + c, f"{kind} {kind} b64", "b64")
    add(f"mul.hi.{kind}", lambda a, b: a * b >> 32)
for kind in ("s32", "s64", "f32", "f64"):
    add(f"neg.{kind}", operator.neg)
for kind in ("pred", "b16", "b32", "b64"):
    add(f"and.{kind}", operator.and_)
    add(f"or.{kind}", operator.or_)
    add(f"xor.{kind}", operator.xor)
    add(f"not.{kind}", operator.invert)
for kind in ("b16", "b32", "b64"):
    add(f"shl.{kind}", lambda a, n: a << n if n < 64 else 0, f"{kind} u32")
    add(f"selp.{kind}", lambda a, b, p: a if p else b, f"{kind} {kind} pred")
    for sign in "us":
        shift = f"{sign}{width(kind)}"
        add(f"shr.{shift}", shifted(shift), f"{shift} u32")
add("popc.b32", lambda a: a.bit_count())
add("prmt.b32", permuted)
add("shf.l.wrap.b32", lambda a, b, n: (b << 32 | a) << n % 32 >> 32, "u32 u32 u32", "u32")
add("shf.r.wrap.b32", lambda a, b, n: (b << 32 | a) >> n % 32, "u32 u32 u32", "u32")
for kind in ("f32", "f64"):
    for rounding in ("", ".rn"):
        add(f"add{rounding}.{kind}", operator.add)
        add(f"sub{rounding}.{kind}" if kind == "f32" else "sub.f64", operator.sub)
        add(f"mul{rounding}.{kind}", operator.mul)
    add(f"div.rn.{kind}", lambda a, b: np.divide(a, b))
    add(f"sqrt.rn.{kind}", np.sqrt)
    add(f"abs.{kind}", np.abs)
    add(f"min.{kind}", np.fmin)
    add(f"max.{kind}", np.fmax)
    add(f"copysign.{kind}", lambda a, b: np.copysign(b, a))


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    if not np.isfinite([a, b, c]).all():
        return a * b + c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    return type(a)(_nearest(exact, type(a))) if exact else a * b + c


def _nearest(exact: Fraction, kind: Any) -> Any:
    """Of numbers of this type. Rounding to fp64 first, and then to fp32, would round twice."""
    near = kind(float(exact))
    around = [near, np.nextafter(near, kind(-np.inf)), np.nextafter(near, kind(np.inf))]
    even = [int(n.view(f"u{n.itemsize}")) % 2 for n in around]
    return min(zip(around, even, strict=True), key=lambda n: (abs(Fraction(float(n[0])) - exact), n[1]))[0]


for kind in ("f32", "f64"):
    add(f"fma.rn.{kind}", fused)


def fused_down(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded towards minus infinity."""
    if not np.isfinite([a, b, c]).all():
        return a * b + c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if not exact:
        return np.float32(0.0 if not np.signbit(a * b) and not np.signbit(c) else -0.0)
    near = np.float32(float(exact))
    return near if Fraction(float(near)) <= exact else np.nextafter(near, np.float32(-np.inf))


add("fma.rm.ftz.f32", fused_down, "f32")
add("cvt.ftz.sat.f32.f32", lambda a: np.fmin(np.fmax(a, np.float32(0)), np.float32(1)) + np.float32(0), "f32")
add("min.NaN.f32", lambda a, b: np.minimum(a, b))
add("max.NaN.f32", lambda a, b: np.maximum(a, b))
add("rcp.rn.f64", lambda a: 1 / a)
for conversion in (
    "f32.bf16", "f32.f16", "f64.bf16", "f64.f16", "f64.f32", "s64.s32", "s32.s16", "s64.s16", "s16.s8",
    "s32.s8", "s64.s8", "u64.u32", "u32.u64", "u32.u16", "u64.u16", "u16.u32", "u16.u64", "u16.u8",
    "u32.u8", "rn.bf16.f32", "rn.f16.f32", "rn.f32.f64", "rn.f32.s32", "rn.f32.u32", "rn.f32.s64",
    "rn.f64.s32", "rn.f64.s64",
):  # fmt: skip
    add(f"cvt.{conversion}", lambda a: a, *conversion.split(".")[:-3:-1])
add("cvt.rni.f32.f32", np.rint, "f32")
add("cvt.rmi.f32.f32", np.floor, "f32")
add("cvt.rni.f64.f64", np.rint, "f64")
add("cvt.rmi.f64.f64", np.floor, "f64")
add("cvt.rzi.s32.f32", np.trunc, "f32", "s32")
add("cvt.rni.s32.f32", np.rint, "f32", "s32")
add("cvt.rni.s32.f64", np.rint, "f64", "s32")
APPROXIMATE: dict[str, tuple[Callable[..., Any], int]] = {  # with the units in the last place that PTX allows
    "div.full.f32": (np.divide, 2),
    "div.approx.f32": (np.divide, 2),
    "rcp.approx.f32": (np.reciprocal, 1),
    "sqrt.approx.f32": (np.sqrt, 1),
    "rsqrt.approx.f32": (lambda a: 1 / np.sqrt(a), 2),
    "rsqrt.approx.ftz.f32": (lambda a: 1 / np.sqrt(np.where(np.abs(a) < 2**-126, 0 * a, a)), 2),
    "ex2.approx.f32": (np.exp2, 2),
    "ex2.approx.ftz.f32": (np.exp2, 2),
}
FLUSHED = {
    "mul.ftz.f32": operator.mul,
    "fma.rm.ftz.f32": fused_down,
    "fma.rn.ftz.f32": lambda a, b, c: a * b + c,
    "abs.ftz.f32": np.abs,
}


def run(
    opcode: str, operands: list[np.ndarray], form: str = "{op} %rd50, {operands};", perturb: int = 0
) -> np.ndarray:
    """The instruction's results in 32 lanes, with a register for each operand."""
    lines, names = [], []
    for k, _ in enumerate(operands):
        lines += [f"mad.wide.u32 %rd1{k}, %r0, 8, %rd{k};", f"ld.global.b64 %rd2{k}, [%rd1{k}];"]
        names.append(f"%rd2{k}")
    result = len(operands)
    lines += [form.format(op=opcode, operands=", ".join(names))]
    lines += [f"mad.wide.u32 %rd30, %r0, 8, %rd{result};", "st.global.b64 [%rd30], %rd50;"]
    to = np.zeros(LANES, np.uint64)
    launch(kernel("\n".join(lines), result + 1), *operands, to, perturb=perturb)
    return to


def operands_of(takes: list[str]) -> list[np.ndarray]:
    """Each operand is in an order of its own, so that edges meet edges and random numbers."""
    generator = np.random.default_rng(0)
    return [
        generator.permutation(bits_of(kind, generator)) if k else bits_of(kind, generator)
        for k, kind in enumerate(takes)
    ]


@pytest.mark.parametrize("opcode", TABLE)
def test_exact(opcode: str) -> None:
    function, takes, gives = TABLE[opcode]
    count = (
        function.__code__.co_argcount
        if hasattr(function, "__code__")
        else 1
        if opcode.split(".")[0] in ("neg", "not", "sqrt", "abs", "cvt")
        else 2
    )
    kinds = takes.split() if " " in takes else [takes] * count
    operands = operands_of(kinds)
    found = run(opcode, operands)
    with np.errstate(all="ignore"):
        for lane, given in enumerate(zip(*operands, strict=True)):
            wanted = function(*map(value, given, kinds))
            if gives[0] not in "fb" and not np.isfinite(float(wanted)):
                continue  # PTX saturates; the kernels convert finite numbers
            assert same(int(found[lane]), bits(wanted, gives), gives), (given, wanted)


def same(found: int, wanted: int, kind: str) -> bool:
    """All NaNs are one."""
    if kind not in FLOATS or found == wanted:
        return found == wanted
    return bool(np.isnan(value(found, kind)) and np.isnan(value(wanted, kind)))


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximate(opcode: str) -> None:
    function, units = APPROXIMATE[opcode]
    operands = operands_of(["f32"] * (2 if opcode.startswith("div") else 1))
    with np.errstate(all="ignore"):
        wanted = function(*(o.astype(np.uint32).view(np.float32) for o in operands)).astype(np.float32)
    finite, several = np.isfinite(wanted), []
    for perturb in (0, 1, 2):  # moved: from a result that is itself rounded
        found, again = (run(opcode, operands, perturb=perturb) for _ in range(2))
        np.testing.assert_array_equal(found, again)
        several.append(found := found.astype(np.uint32).view(np.float32))
        np.testing.assert_array_equal(found[~finite], wanted[~finite])
        most = (units + (perturb > 0)) * np.spacing(np.abs(wanted[finite]))
        assert (np.abs(found[finite] - wanted[finite]) <= most).all()
    assert all((a[finite] != b[finite]).any() for a, b in itertools.combinations(several, 2))


@pytest.mark.parametrize("opcode", FLUSHED)
def test_subnormals_are_flushed(opcode: str) -> None:
    tiny = np.full(LANES, np.float32(1e-39).view(np.uint32), np.uint64)
    large = np.full(LANES, np.float32(-1e20).view(np.uint32), np.uint64)
    takes = {"mul": [tiny, large], "fma": [tiny, large, tiny], "abs": [tiny]}[opcode.partition(".")[0]]
    assert not (run(opcode, takes) & np.uint64(0x7FFFFFFF)).any()


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


@pytest.mark.parametrize(
    "kind", ["f32", "f64", "s16", "u16", "b16", "s32", "u32", "b32", "s64", "u64", "b64"]
)
def test_comparisons(kind: str) -> None:
    def compared(comparison: str) -> np.ndarray:
        form = "setp.{op} %p1, {operands};\nselp.b64 %rd50, 1, 0, %p1;"
        return run(f"{comparison}.{kind}", operands, form).astype(bool)

    operands = operands_of([kind, kind])
    operands[1][:8] = operands[0][:8]
    pairs = [(value(a, kind), value(b, kind)) for a, b in zip(*operands, strict=True)]
    nan = np.array([a != a or b != b for a, b in pairs])
    functions = {**COMPARISONS, **(UNSIGNED if kind[0] == "u" else {})}
    for comparison, function in functions.items():
        wanted = np.array([bool(function(a, b)) for a, b in pairs]) & ~nan
        assert (compared(comparison) == wanted).all(), comparison
        if kind[0] == "f":
            assert (compared(f"{comparison}u") == (wanted | nan)).all(), comparison
    if kind[0] == "f":
        assert (compared("nan") == nan).all()
        assert (compared("num") == ~nan).all()


def test_every_instruction_of_the_table_is_tested() -> None:
    from bnfast.ptx.program import _SPELLED

    tested = {_SPELLED[opcode] for opcode in (*TABLE, *APPROXIMATE, *FLUSHED)}
    made_of_several = {"move", "pack16", "pack32", "f_to_bf16x2", "f_to_f16x2", "s32_to_8"}  # below
    compared = {name for name in CODES if name.startswith("set_")}
    assert {*_SPELLED.values()} - tested - made_of_several - compared == set()


PACK, UNPACK = (
    "{op} %rd50, {{ {operands} }};",
    "{op} {{ %rd51, %rd52 }}, {operands};\nmov.b64 %rd50, {{ %rd52, %rd51 }};",
)


@pytest.mark.parametrize(("opcode", "half"), [("mov.b32", 16), ("mov.b64", 32)])
def test_pairs_are_packed_and_unpacked(opcode: str, half: int) -> None:
    low, high = (bits_of(f"b{half}", np.random.default_rng(seed)) for seed in (1, 2))
    both = low | high << np.uint64(half)
    assert (run(opcode, [low, high], PACK) == both).all()
    assert (run(opcode, [both], UNPACK) == (high | low << np.uint64(32))).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_two_are_converted_at_a_time(kind: str) -> None:
    high, low = operands_of(["f32", "f32"])
    with np.errstate(all="ignore"):
        wanted = [
            bits(value(a, "f32"), kind) << 16 | bits(value(b, "f32"), kind)
            for a, b in zip(high, low, strict=True)
        ]
    assert run(f"cvt.rn.{kind}x2.f32", [high, low]).tolist() == wanted


def test_the_lowest_byte_gives_its_sign_to_16_bits() -> None:
    (values,) = operands_of(["s32"])
    found = run("cvt.s8.s32", [values], "{op} %rs1, {operands};\ncvt.u64.u16 %rd50, %rs1;")
    assert (found == values.astype(np.int8).astype(np.int16).astype(np.uint16)).all()


def test_reduction_over_a_warp() -> None:
    values = np.arange(LANES, dtype=np.uint64) + 2**32 - 5
    wanted = int(values.sum()) % 2**32
    assert run("redux.sync.add.s32", [values], "{op} %rd50, {operands}, -1;").tolist() == [wanted] * LANES
    with pytest.raises(Fault, match="a reduction of a part of a warp"):
        run("redux.sync.add.s32", [values], "{op} %rd50, {operands}, 255;")
