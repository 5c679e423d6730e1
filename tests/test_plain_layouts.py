"""Plain torch's gradients, whatever memory the input and the incoming gradient lie in: against formulas in
fp64. torch's own operators are no oracle, as their backward trusts strides that fit two memory formats."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.testing import assert_close

import bnfast
from bnfast import functional

pytestmark = pytest.mark.usefixtures("plain_torch_in_one_thread")
Named = dict[str, Tensor]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
EPS = 1e-3


def reversed_strides(t: Tensor) -> Tensor:
    """The last dimension outermost: with sizes of 1, strides that fit both formats or only seem to."""
    dims = list(range(t.dim()))[::-1]
    return t.permute(dims).contiguous().permute(dims)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=LAST[t.dim()]),
    "reversed": reversed_strides,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels sliced": lambda t: torch.cat((t, t), 1).contiguous(memory_format=LAST[t.dim()])[:, : t.size(1)],
    "expanded": lambda t: t[:, :, :1, :1].clone().expand(t.shape),
}
SHAPES = [
    (1, 3, 4, 5), (1, 3, 1, 3), (1, 3, 3, 1), (1, 1, 2, 3), (2, 6, 2, 3), (2, 3, 1, 3),
    (1, 3, 2, 1, 3), (1, 3, 2, 3, 2),
]  # fmt: skip


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    c = x.shape[1]
    return torch.linspace(-1, 1, c, dtype=x.dtype), torch.linspace(0.5, 2, c, dtype=x.dtype)


def normalize(name: str, x: Tensor, w: Tensor | None, b: Tensor | None, **after: Any) -> Tensor:
    kind, _, mode = name.partition(", ")
    given = (None, None) if kind in ("batch", "instance") and not mode else statistics(x)
    if kind in ("batch", "instance"):
        function = getattr(functional, f"{kind}_norm")
        return function(x, *given, w, b, mode != "eval", 0.1, EPS, **after)
    if kind == "group":
        return functional.group_norm(x, min(3, x.shape[1]), w, b, EPS, **after)
    return functional.layer_norm(x, x.shape[1:], w, b, EPS, **after)


# The number of cells of a sample, from that of channels; 0: cells are channels; None: statistics are given.
CELLS: dict[str, Callable[[int], int] | None] = {
    "batch": lambda c: 0,
    "batch, tracking": lambda c: 0,
    "batch, eval": None,
    "instance": lambda c: c,
    "instance, tracking": lambda c: c,
    "instance, eval": None,
    "group": lambda c: min(3, c),
    "layer": lambda c: 1,
}


def truth(name: str, x: Tensor, dy: Tensor, w: Tensor, b: Tensor, z: Tensor | None) -> Named:
    """Formulas, on contiguous fp64. With a residual, silu follows."""
    x, dy, cells = x.contiguous(), dy.contiguous(), CELLS[name]
    shape = x.shape[1:] if w.dim() > 1 else (x.shape[1], *[1] * (x.dim() - 2))
    gamma, dims = w.view(shape), [0, *range(2, x.dim())] if w.dim() == 1 else [0]

    def by_cell(t: Tensor) -> Tensor:
        n = cells(x.shape[1]) if cells else 0
        return t.reshape(len(t), n, -1) if n else t.transpose(0, 1).reshape(1, x.shape[1], -1)

    def back(t: Tensor) -> Tensor:
        if cells and cells(x.shape[1]):
            return t.reshape(x.shape)
        return t.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)

    seen = by_cell(x)
    if cells is None:
        mean, variance = (t.view(1, -1, 1) for t in statistics(x))
    else:
        mean = seen.mean(-1, True)
        variance = (seen - mean).square().mean(-1, True)
    rstd = (variance + EPS) ** -0.5
    xhat = (seen - mean) * rstd
    y, g = back(xhat) * gamma + b.view(shape), dy
    if z is not None:
        v = y + z.contiguous()
        s = 1 / (1 + torch.exp(-v))
        y, g = v * s, dy * (s + v * s * (1 - s))
    h = by_cell(g * gamma)
    dx = rstd * (h if cells is None else h - h.mean(-1, True) - xhat * (h * xhat).mean(-1, True))
    found = {"y": y, "dx": back(dx), "dw": (g * back(xhat)).sum(dims), "db": g.sum(dims)}
    return found if z is None else found | {"dz": g}


def cases(name: str) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for shape in SHAPES:
        vector = shape[1:] if name == "layer" else shape[1:2]
        for (of_x, x_as), (of_dy, dy_as) in itertools.product(LAYOUTS.items(), repeat=2):
            what = f"{shape}, x {of_x}, dy {of_dy}"
            yield what, x_as(random(*shape)), dy_as(random(*shape)), random(*vector), random(*vector)


def run(name: str, x: Tensor, dy: Tensor, w: Tensor | None, b: Tensor | None, z: Tensor | None) -> Named:
    leaves = {"dx": x, "dw": w, "db": b, "dz": z}
    leaves = {key: t.detach().requires_grad_() for key, t in leaves.items() if t is not None}
    after = {} if z is None else {"activation": "silu", "residual": leaves["dz"]}
    y = normalize(name, leaves["dx"], leaves.get("dw"), leaves.get("db"), **after)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("after", [False, True], ids=["alone", "affine, then residual and silu"])
@pytest.mark.parametrize("name", CELLS)
def test_gradients_in_every_layout(name: str, after: bool) -> None:
    wrong = []
    for what, x, dy, w, b in cases(name):
        w_b, z = ((w, b), dy.flip(1)) if after else ((None, None), None)
        expected = truth(name, x, dy, *((w, b) if after else (torch.ones_like(w), torch.zeros_like(b))), z)
        for key, value in run(name, x, dy, *w_b, z).items():
            if not torch.allclose(value, expected[key], rtol=1e-9, atol=1e-9):
                wrong.append(f"{key} of {what}")
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"


def by_hand(x: Tensor) -> Tensor:
    """InstanceNorm."""
    mean = x.mean((2, 3), True)
    return (x - mean) / ((x - mean).square().mean((2, 3), True) + EPS).sqrt()


def exported(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(layer, (x,)).module()


WAYS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]] = {
    "eager": lambda layer, x: layer,
    "compiled": lambda layer, x: torch.compile(layer, backend="aot_eager", fullgraph=True),
    "traced": lambda layer, x: torch.jit.trace(layer, x),
    "exported": exported,
}


def loss(y: Tensor) -> Tensor:
    """Whose gradient is channels_last."""
    return (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).to(memory_format=LAST[4]).sin()).sum()


@pytest.mark.parametrize("way", WAYS)
def test_one_sample_of_instance_norm(way: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=LAST[4]).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = WAYS[way](bnfast.InstanceNorm2d(3, eps=EPS), x.detach())
    found = []
    for function in (call, by_hand):
        (dx,) = torch.autograd.grad(loss(function(x)), x, create_graph=way == "eager")
        found.append([dx])
        if way == "eager":
            found[-1] += torch.autograd.grad(loss(dx.square()), x)
    assert_close(*found, check_stride=False)


def test_one_sample_at_a_time() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=LAST[4])
    layer = bnfast.InstanceNorm2d(3, eps=EPS)
    expected = grad(lambda x: loss(by_hand(x)))(x[:1])
    assert_close(grad(lambda x: loss(layer(x)))(x[:1]), expected, check_stride=False)
    each = vmap(grad(lambda x: loss(layer(x[None]))))(x)
    assert_close(each[:1], expected, check_stride=False)
    _, forward = torch.func.jvp(layer, (x[:1],), (x[1:],))
    assert_close(forward, torch.func.jvp(by_hand, (x[:1],), (x[1:],))[1], check_stride=False)
