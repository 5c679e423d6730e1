"""BatchNorm with what surrounds it as one cuDNN graph a direction; cudnn_graphs.py has the graphs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.contender import Baseline, Contender, lacks
from benchmarks.baselines.cudnn_graphs import PACKAGE, TYPES, Buffers, Plan, plans
from benchmarks.baselines.given import given
from codegen.cases import NAMES, Case


class _Graphs(torch.autograd.Function):
    """The mask has a byte an element, as in NVIDIA's samples, of which cuDNN writes a bit: its peak memory is
    larger than it need be."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor,
        running: tuple[Tensor, Tensor], both: tuple[Plan, Plan], masked: bool,
    ) -> Tensor:  # fmt: skip
        mean, variance = running
        y, batch_mean, batch_rstd = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
        kept: Buffers = {"x": x, "weight": weight, "batch_mean": batch_mean, "batch_rstd": batch_rstd}
        if masked:
            kept["mask"] = torch.empty_like(x, dtype=torch.bool)
        buffers: Buffers = {
            **kept, "y": y, "bias": bias, "mean": mean, "variance": variance,
            "new_mean": mean, "new_variance": variance, **({} if z is None else {"z": z}),
        }  # fmt: skip
        both[0].run(buffers)
        ctx.save_for_backward(*kept.values())
        ctx.names, ctx.plan, ctx.residual = tuple(kept), both[1], z is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        weight = kept["weight"]
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        given: Buffers = {"dy": dy, **kept, "dx": torch.empty_like(dy), "dweight": dweight, "dbias": dbias}
        dz = dy if ctx.residual else None
        if ctx.residual and "mask" in kept:
            dz = given["dz"] = torch.empty_like(dy)
        ctx.plan.run(given)
        return given["dx"], dz, dweight, dbias, None, None, None


def _unable(case: Case, device: torch.device) -> str | None:
    if case.norm != "BatchNorm":
        return f"its graphs here are BatchNorm's, not {case.norm}'s"
    if case.activation not in (None, "relu"):
        return f"its graphs here have no {case.activation}"
    if case.dtype not in TYPES:
        return f"it has no {NAMES[case.dtype]}"
    if device.type != "cuda":
        return "needs a GPU with cuDNN"
    return lacks(PACKAGE)


def _build(case: Case, device: torch.device) -> Contender:
    """Raises what the package says where the machine's cuDNN has no engine for the case."""
    g, both = given(case, device), plans(case, device)
    running, masked = (g.running_mean, g.running_var), case.activation is not None

    def forward(x: Tensor, z: Tensor | None) -> Tensor:
        y: Tensor = _Graphs.apply(x, z, g.weight, g.bias, running, both, masked)
        return y

    version = import_module(PACKAGE).backend_version()
    zeros = ", reads zeros of x's size" if both[0].reads_zeros else ""
    return Contender(f"cuDNN {version}, a graph each way{zeros}", forward, g.parameters)


ALL = (
    Baseline("cudnn-frontend", "cuDNN's fused graphs, by nvidia-cudnn-frontend", _unable, _build),
)  # fmt: skip
