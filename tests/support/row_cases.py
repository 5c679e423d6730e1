"""The row kernels with the signatures that the host code launches them with, ready for
codegen.sass.compile_kernel.
"""

from __future__ import annotations

from typing import Any

from bnfast.kernels import column_sums, row_activation, row_gradients, row_norm, row_plan
from bnfast.kernels.epilogue import Activation
from tests.support.kernel_cases import DATA, ITEMSIZES, Call

KINDS = ("forward", "gradients", "column_gradients", "wide_gradients", "column_sums")
SMS = 132


def sized(rows: int, width: int, dtype: str) -> row_plan.Rows:
    return row_plan.Rows(rows, width, ITEMSIZES[dtype], True, SMS)


def call(
    kind: str, rows: int, width: int, dtype: str, parameters: str | None = None, wanted: str = "wb",
    activation: str = "none", z: bool = False,
) -> Call | None:  # fmt: skip
    """A launch of that kind for [rows, width], or None where the plan has none. parameters: the type of gamma
    and beta, by default the accumulator's. wanted: whose gradients, gamma ("w"), beta ("b"). activation,
    z: what follows, in the forward and in the launch of a backward that is for it."""
    size, accumulator = sized(rows, width, dtype), "fp64" if dtype == "fp64" else "fp32"
    absent: set[str] = set() if z else {"residual_ptr"}
    flags: tuple[Any, ...] = ("w" in wanted, "b" in wanted)
    sweep: row_plan.RowPlan | None
    if kind == "forward":
        form, sweep = row_plan.forward(size)
        kernel = row_norm.row_norm_kernel if form == "held" else row_norm.long_row_norm_kernel
        flags = (Activation(activation),)
    elif kind == "activation":
        kernel, sweep = row_activation.row_activation_kernel, row_plan.activation(size)
        flags = (Activation(activation),)
    elif kind == "gradients":
        kernel, sweep = row_gradients.row_gradients_kernel, row_plan.gradients(size)
        absent = set() if wanted else {"partials_ptr"}
    elif kind == "column_gradients":
        kernel, sweep = row_gradients.column_gradients_kernel, row_plan.column_gradients(size)
        absent = set() if row_plan.gradients(size) is None else {"weight_ptr", "shares_ptr"}
        absent |= set() if wanted else {"partials_ptr"}
    elif kind == "wide_gradients":
        kernel, sweep, flags = row_gradients.wide_gradients_kernel, row_plan.wide_gradients(size), ()
    else:
        partials = (row_plan.gradients(size) or row_plan.column_gradients(size)).partials
        kernel, sweep = column_sums.column_sums_kernel, row_plan.column_sums(partials, width, len(wanted))
        absent, flags = {n for n, k in (("first_ptr", "w"), ("second_ptr", "b")) if k not in wanted}, ()
    if sweep is None:
        return None
    names = [p.name for p in kernel.params if p.is_constexpr]
    constexprs = dict(zip(names, (sweep.tile, *flags), strict=True))
    signature: dict[str, Any] = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            continue
        if name in absent:
            signature[name] = None
        elif name in DATA:
            signature[name] = f"*{dtype}"
        elif name in ("weight_ptr", "bias_ptr", "first_ptr", "second_ptr"):
            signature[name] = f"*{parameters or accumulator}"
        elif name.endswith("_ptr"):
            signature[name] = f"*{accumulator}"
        else:
            signature[name] = "fp64" if name == "eps" else "i32"
    unspecialised = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    pointers = (n for n, t in signature.items() if isinstance(t, str) and t.startswith("*"))
    return Call(kernel, signature, constexprs, tuple(n for n in pointers if n not in unspecialised), sweep)
