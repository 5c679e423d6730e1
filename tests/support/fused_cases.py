"""Layers that go on to add a residual and apply an activation: inputs, what a function makes of them, and its
judgement beside torch, which does the same one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnfast import exact
from tests.support.layers import NORMS, derivatives, followed, groups, norms, statistics

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Named = dict[str, Tensor]
EPS = 1e-5


# the norms of tests.support.layers that go on
LAYERS = {"train": "batch", "eval": "batch, eval", "group": "group", "instance": "instance", "layer": "layer"}


def given(
    shape: tuple[int, ...], dtype: torch.dtype, layer: str, layout: str = "contiguous", residual: bool = True,
    device: str = "cpu",
) -> Named:  # fmt: skip
    """x, dy, weight, bias and, if asked for, z."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device=device)

    wide = exact.accumulator(dtype)
    memory_format = FORMATS[layout] if len(shape) == 4 else torch.contiguous_format
    vector = shape[-1] if layer == "layer" else shape[1]
    made = {"x": random(*shape) + 0.5, "dy": random(*shape), "z": random(*shape)}
    made = {name: t.to(dtype).contiguous(memory_format=memory_format) for name, t in made.items()}
    if not residual:
        del made["z"]
    return {**made, "weight": random(vector).to(wide), "bias": random(vector).to(wide)}


def ours(layer: str, activation: Any) -> Callable[..., Tensor]:
    """A function of x, weight, bias and z."""
    return lambda x, weight, bias, z=None: norms(LAYERS[layer])[0](x, weight, bias, z, activation=activation)


def theirs(layer: str, activation: Any) -> Callable[..., Tensor]:
    """The same by torch, one after another, each result in x's type."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        # in fp32, as torch on a CPU takes no mixed types everywhere; the result is rounded as its own is
        y = NORMS[LAYERS[layer]](F, x.to(exact.accumulator(x.dtype)), weight, bias).to(x.dtype)
        return followed(y, z, activation)

    return call


def run(function: Callable[..., Tensor], g: Named) -> Named:
    """y and all gradients."""
    return derivatives(function, g["x"], [g[name] for name in ("weight", "bias", "z") if name in g], g["dy"])


def summed_once(layer: str, g: Named, dy: Tensor) -> Named:
    """y and gradients of the layer alone in fp64, each sum rounded once: torch's own would be the error."""
    x, weight, bias = g["x"], g["weight"], g["bias"]
    if layer in ("train", "eval"):
        e = exact.batch_norm(x, dy, weight, bias, EPS, statistics(x) if layer == "eval" else None)
    elif layer == "layer":
        e = exact.layer_norm(x, dy, weight, bias, EPS)
    else:
        sets = x.shape[1] if layer == "instance" else groups(x)
        e = exact.batch_norm(x, dy, weight, bias, EPS, groups=sets)
    return {name: value for name, (value, _) in e.results(x, dy).items()}


def truth(layer: str, activation: Any, g: Named) -> Named:
    """y and all gradients in fp64."""
    if g["x"].dtype != torch.float64:
        return run(theirs(layer, activation), {n: t.double() for n, t in g.items()})
    before = summed_once(layer, g, g["dy"])["y"].requires_grad_()
    y = followed(before, g.get("z"), activation)
    (slope,) = torch.autograd.grad(y, before, g["dy"])
    added = {"dz": slope} if "z" in g else {}
    return {**summed_once(layer, g, slope), **added, "y": y.detach()}


def check(layer: str, activation: Any, g: Named, found: Named) -> None:
    """Errors at most twice torch's own at the same types, plus a few units: of the worst element, and as root
    mean square. Memory as x's, but for LayerNorm, which is contiguous as torch's."""
    true = truth(layer, activation, g)
    others = run(theirs(layer, activation), g)
    assert found.keys() == true.keys()
    for name, value in found.items():
        assert value.dtype == others[name].dtype, name
        error, other = (t[name].double() - true[name] for t in (found, others))
        unit, size = torch.finfo(value.dtype).eps, true[name]
        for measure in (lambda t: t.abs().max().item(), lambda t: t.square().mean().sqrt().item()):
            assert measure(error) <= 2 * measure(other) + 4 * unit * measure(size), name
    for name in ("y", "dx") + (("dz",) if "z" in g else ()):
        if layer not in ("instance", "layer"):
            assert found[name].stride() == g["x"].stride(), name
