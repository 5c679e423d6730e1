"""That providers do the same work: right results, the input's layout, and nothing copied on the side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baselines import EPS, Provider, followed, given, inputs
from bnfast.kernels.records import BatchNormOptions, GroupNormOptions
from bnfast.reference import batchnorm, groupnorm
from codegen.cases import NAMES, Case

# Operators that make a copy of a tensor, of whatever layout or type; what `.contiguous()`, `.to()` and
# `.clone()` come to, and copy_ into memory that a graph or a layer keeps.
COPIES = {"aten::clone", "aten::_to_copy", "aten::copy_", "aten::contiguous", "aten::_copy_from"}
# Root mean square errors as shares of the result's, beyond which nothing is timed: of y, of gradients, and of
# gradients where the activation has corners. There an unfused chain, which rounds before the activation, has
# another slope for the few values next to one: torch's on a CPU are off by up to 0.065 in bf16 and 0.031 in
# fp16, and by half a unit of the type (bf16: 0.004) everywhere else. Wrong layouts, reductions or gradients
# are off by about 1.
LIMITS = {
    "fp64": (1e-12, 1e-10, 1e-10),
    "fp32": (1e-5, 1e-4, 6e-4),
    "fp16": (2e-3, 4e-3, 0.05),
    "bf16": (0.016, 0.03, 0.15),
}
CORNERS = {"relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid"}
SMALL = 4096  # bytes: copies of parameters and counters are no part of the work either way


class _Counting(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._schema.name in COPIES and isinstance(found, Tensor) and found.nbytes > SMALL:
            self.bytes += found.nbytes
        return found


def step(provider: Provider, case: Case, device: torch.device) -> dict[str, Tensor]:
    """One forward and backward: y, and the gradients of x, z and the parameters."""
    x, z, dy = inputs(case, device)
    y = provider.forward(x, z)
    names = ("dx", *["dz"] * case.residual, "dweight", "dbias")
    return {"y": y.detach(), **dict(zip(names, provider.backward(y, x, z, dy), strict=True))}


def copies(provider: Provider, case: Case, device: torch.device) -> int:
    """Bytes that a forward and a backward copy beside the work, as far as torch's dispatcher sees them: not
    what a kernel copies inside. It has run before, as a first call may set things up."""
    with _Counting() as counting:
        step(provider, case, device)
    return counting.bytes


def truth(case: Case, device: torch.device) -> dict[str, Tensor]:
    """The same step by the formulas of bnfast.reference in fp64, rounded once at the end."""
    (weight, bias), _ = given(case, device, torch.float64)

    def norm(x: Tensor) -> Tensor:
        none = x.new_empty(0)  # in training, the formulas read no statistics
        if case.norm == "BatchNorm":
            return batchnorm.batch_norm(x, weight, bias, none, BatchNormOptions(True, 0.0, EPS))
        return groupnorm.group_norm(x, weight, bias, none, GroupNormOptions(case.groups, EPS))

    def forward(x: Tensor, z: Tensor | None) -> Tensor:
        return followed(case, norm)(x.double(), None if z is None else z.double()).to(x.dtype)

    return step(Provider("fp64", forward, [weight, bias]), case, device)


def strayed(found: dict[str, Tensor], case: Case) -> str:
    """Which results of a step are not laid out as x is; empty if all are. torch's GroupNorm and InstanceNorm
    return contiguous tensors: that is theirs to do, and told."""
    names = [n for n in ("y", "dx") if not found[n].is_contiguous(memory_format=case.memory_format)]
    return f"not {case.layout}, as x is: {', '.join(names)}" if names else ""


def checked(found: dict[str, Tensor], case: Case, device: torch.device) -> str | None:
    """What is wrong with the results of a step; None if they are right."""
    expected = truth(case, device)
    of_y, smooth, corners = LIMITS[NAMES[case.dtype]]
    of_gradients = corners if case.activation in CORNERS else smooth
    for name, value in found.items():
        limit = of_y if name == "y" else of_gradients
        true = expected[name].double()
        error, size = (float(t.square().mean().sqrt()) for t in (value.double() - true, true))
        if not error <= limit * size:  # so that NaN is wrong, and 0 where 0 is expected right
            return f"{name} is off by {error:.2g}, {limit:.2g} of its size {size:.2g} is allowed"
    return None
