"""GroupNorm's and InstanceNorm's inputs, what a function makes of them, and its judgement beside torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfast import exact
from bnfast.checks import peers
from tests.support import kernel_calls as kernels

EPS = 1e-5
FORMATS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
Named = dict[str, Tensor]
Function = Callable[[Tensor, int, Tensor | None, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class Given:
    """x, dy: [N, C, *]; gamma and beta: [C] or None."""

    x: Tensor
    dy: Tensor
    groups: int
    weight: Tensor | None
    bias: Tensor | None


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laid_out(t: Tensor, layout: str) -> Tensor:
    if t.dim() < 4 or layout == "contiguous":
        return t.contiguous()
    return t.contiguous(memory_format=FORMATS[t.dim()])


def given(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype = torch.float32, *, layout: str = "contiguous",
    mean: float = 0.5, parameters: torch.dtype | None = None, affine: str = "wb",
) -> Given:  # fmt: skip
    """Random numbers. affine: which of gamma ("w") and beta ("b") there are."""
    kind = parameters or exact.accumulator(dtype)
    x, dy = (laid_out(t.to(dtype), layout) for t in (random(*shape) + mean, random(*shape, seed=1)))
    weight, bias = ((random(shape[1], seed=n) + 0.5).to(kind) for n in (2, 3))
    return Given(x, dy, groups, weight if "w" in affine else None, bias if "b" in affine else None)


def run(function: Function, g: Given) -> Named:
    """y and all gradients there are."""
    leaves = {"dx": g.x, "dweight": g.weight, "dbias": g.bias}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in leaves.items() if t is not None}
    y = function(leaves["dx"], g.groups, leaves.get("dweight"), leaves.get("dbias"), EPS)
    gradients = torch.autograd.grad(y, list(leaves.values()), g.dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(g: Given, ours: Named) -> None:
    """Asserts that all results are good enough, and lie in memory as x does."""
    expected = exact.group_norm(g.x, g.dy, g.groups, g.weight, g.bias, EPS)
    theirs = run(peers.group_norm, g)
    assert ours.keys() == theirs.keys()
    bad = {}
    for name, value in ours.items():
        verdict = exact.judge(value, theirs[name], expected[name], exact.accumulator(g.x.dtype))
        if not verdict.ok:
            bad[name] = str(verdict)
    assert not bad, bad
    assert ours["y"].stride() == ours["dx"].stride() == g.x.stride()
    assert ours["y"].dtype == ours["dx"].dtype == g.x.dtype


def by_kernels(g: Given, wanted: tuple[bool, bool, bool] = (True, True, True)) -> list[Tensor | None]:
    """[y, table, dx, dweight, dbias] of the host code's two calls."""
    y, table, _ = kernels.group_norm(g.x, g.groups, g.weight, g.bias)
    weight_dtype, bias_dtype = (table.dtype if want else None for want in wanted[1:])
    asked = (wanted[0], weight_dtype, bias_dtype)
    return [y, table, *kernels.group_norm_backward(g.x, g.dy, table, g.groups, g.weight, asked)[:3]]
