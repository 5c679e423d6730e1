"""The kernels with the signatures that the host code launches them with, ready for
codegen.sass.compile_kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bnfast.kernels import elementwise, one_pass, plan, reduce
from bnfast.kernels.epilogue import Activation
from bnfast.kernels.group_plan import swept
from bnfast.kernels.normalizers.batch_norm import BATCH_NORM
from bnfast.kernels.normalizers.batch_renorm import BATCH_RENORM
from bnfast.kernels.normalizers.common import Normalizer
from bnfast.kernels.normalizers.group_norm import CHANNELS, GROUPS
from bnfast.kernels.records import Problem
from codegen.sass import Report, compile_kernel

KINDS = ("statistics", "transform", "gradient_sums", "gradient_transform")
KERNELS = {
    "statistics": reduce.statistics_kernel,
    "transform": elementwise.transform_kernel,
    "gradient_sums": reduce.gradient_sums_kernel,
    "gradient_transform": elementwise.gradient_transform_kernel,
}
ITEMSIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
# pointers to x's type; the rest point to fp32 (fp64 for fp64), to counters, or are None
DATA = {"x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "residual_ptr", "dresidual_ptr"}


@dataclass(frozen=True)
class After:
    """What follows the normalization: an activation, and what a residual leaves for it: z, signs or ""."""

    name: str = "none"
    residual: str = ""

    def __str__(self) -> str:
        return self.name + f"+{self.residual}" * bool(self.residual)

    def called(self, kind: str) -> str:
        """With a residual, the second launch of the backward reads dz, which is past the activation."""
        return "none" if kind == "gradient_transform" and self.residual else self.name

    def absent(self, kind: str, within: bool) -> set[str]:
        """Pointers that a kernel is not given. A backward keeps z or signs, a forward has z in any case."""
        gone = set()
        if kind == "transform":
            gone |= {"residual_ptr"} if not self.residual else set()
            gone |= {"relu_mask_ptr"} if self.residual != "signs" else set()
        elif kind == "gradient_sums":
            gone |= {f"{name}_ptr" for name in ("z", "signs") if name != self.residual}
            gone |= {"dresidual_ptr"} if not self.residual else set()
        if not within or self.name == "none":
            gone.add("bias_ptr")
        return gone


@dataclass(frozen=True)
class Shape:
    """n, c, s as in plan.batch_norm. groups: of a GroupNorm (0: a BatchNorm, or with `renorm` a Batch
    Renorm).
    """

    n: int
    c: int
    s: int
    channels_last: bool
    groups: int = 0
    renorm: bool = False

    def __str__(self) -> str:
        words = f"{self.n}x{self.c}x{self.s} {'channels_last' if self.channels_last else 'contiguous'}"
        return words + f" {self.groups} groups" * (self.groups > 0) + " renorm" * self.renorm

    def by_group(self, kind: str) -> bool:
        """Whether a kernel sees contiguous groups as runs."""
        return kind == "statistics" and self.groups > 0 and not self.channels_last

    def norm(self, kind: str) -> Normalizer:
        if not self.groups:
            return replace(BATCH_RENORM, guarded=True) if self.renorm else BATCH_NORM
        return CHANNELS if self.by_group(kind) or self.groups == self.c else GROUPS

    def sweep(self, kind: str, dtype: str, after: After) -> plan.PassPlan:
        if self.groups or after != After():
            reduces = kind in ("statistics", "gradient_sums")
            inputs = 2 if kind.startswith("gradient") else 1
            inputs += kind == "gradient_sums" and after.residual == "z"
            inputs += kind == "transform" and after.residual != ""
            name = "none" if kind == "statistics" else after.called(kind)
            make = plan.plan_reduction if reduces else plan.plan_elementwise
            x = Problem(self.n, self.c, self.s, ITEMSIZES[dtype], self.channels_last)
            if not self.groups:
                return make(x, inputs, activation=name)
            return swept(make, x, self.groups, self.by_group(kind), inputs, name)
        plans = plan.batch_norm(self.n, self.c, self.s, ITEMSIZES[dtype], self.channels_last)
        return getattr(plans, kind)


@dataclass(frozen=True)
class Call:
    """The arguments of compile_kernel for one launch of the host code."""

    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    sweep: Any = field(repr=False)  # of plan.py or row_plan.py

    @property
    def variant(self) -> tuple[Any, ...]:
        """Equal for calls that compile to the same code."""
        launch = (self.sweep.warps, self.sweep.registers)
        return (self.kernel.__name__, *self.signature.items(), *self.constexprs.items(), *launch)


def call(kind: str, shape: Shape, dtype: str, evaluating: bool = False, after: After = After()) -> Call:
    """A training launch, or the eval one of that kernel (transform: the forward; gradient_sums: the
    backward sweep).
    """
    kernel, sweep = KERNELS[kind], shape.sweep(kind, dtype, after)
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    constexprs: dict[str, Any] = {"T": sweep.tile}
    parameters, running = {"weight_ptr", "bias_ptr"}, {"running_mean_ptr", "running_var_ptr", "batches_ptr"}
    within = shape.groups > 0
    if kind == "statistics":
        constexprs |= {"NORM": shape.norm(kind)}
        absent = running | parameters if within else set() if shape.renorm else {"batches_ptr"}
    elif kind == "transform":
        norm = GROUPS if within else None if evaluating else BATCH_NORM
        constexprs |= {"NORM": norm, "CENTRED": True}
        absent = running if within else {"batches_ptr"} if evaluating else (running | parameters)
        if not within and not evaluating:
            absent -= {"batches_ptr"}
    elif kind == "gradient_sums":
        constexprs |= {"NORM": shape.norm(kind)}
        absent = {"dx_ptr", "dweight_ptr", "dbias_ptr"} if within else {"weight_ptr", "sums_ptr"}
        if not within:
            absent |= {"dx_coeffs_ptr" if evaluating else "dx_ptr"}
    else:
        constexprs |= {"NORM": shape.norm(kind)}
        absent = set() if within else {"weight_ptr"}
    if kind.startswith("gradient"):
        absent |= after.absent(kind, within)
    elif kind == "transform":
        absent |= after.absent(kind, within) - {"bias_ptr"}
    if kind != "statistics":
        constexprs |= {"ACT": Activation(after.called(kind))}
    signature: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name in absent:
            signature[name] = None
        elif name in DATA:
            signature[name] = f"*{dtype}"
        elif name == "relu_mask_ptr":
            signature[name] = "*u8"
        elif name == "semaphores_ptr":
            signature[name] = "*i32"
        elif name == "batches_ptr":
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = f"*{accumulator}"
        else:
            signature[name] = "i32" if name in reduce.SIZES else "fp64"
    anywhere = {*reduce.PARAMETERS}
    aligned = tuple(
        n for n, t in signature.items() if isinstance(t, str) and t.startswith("*") and n not in anywhere
    )
    return Call(kernel, signature, constexprs, aligned, sweep)


def compiled_held(
    kernel: Any, constexprs: dict[str, Any], absent: set[str], dtype: str, warps: int, registers: int
) -> Report:
    """A kernel of one_pass.py, which holds whole groups."""
    kinds = {"relu_mask_ptr": "*u8", "eps": "fp64", **dict.fromkeys(DATA, f"*{dtype}")}
    names = [name for name in kernel.arg_names if name not in constexprs]
    signature = {
        name: None if name in absent else kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    vectors = (n for n in names if n.endswith("_ptr") and n not in (*one_pass.PARAMETERS, *absent))
    return compile_kernel(
        kernel, signature, constexprs, aligned=tuple(vectors), num_warps=warps, maxnreg=registers
    )
