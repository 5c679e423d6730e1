"""Whole models: activations and residual adds folded into the normalization layers' calls."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .activation import Activation
from .convert import convert
from .fusing.blocks import FusedBlock, live_sites, unfuse
from .fusing.layers import NORMS
from .fusing.survey import fuse_block, plan


class Fused(NamedTuple):
    """A layer that applies what follows it. norm: its name in the model. residual: whether an add comes
    before the activation. block: the module whose forward calls the layer, "" for the model itself."""

    norm: str
    activation: Activation
    residual: bool
    block: str


class Skipped(NamedTuple):
    """A layer that runs by itself, and why."""

    norm: str
    reason: str


class FusionReport(NamedTuple):
    """Every normalization layer of a model once, in the model's order."""

    fused: tuple[Fused, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        lines = [
            f"{f.norm}: {'add, ' if f.residual else ''}{f.activation.name} fused in, in the forward of "
            f"{f.block or 'the model'}"
            for f in self.fused
        ]
        lines += [f"{s.norm}: by itself: {s.reason}" for s in self.skipped]
        return "\n".join([f"{len(self.fused)} fused, {len(self.skipped)} not", *lines])


def fuse(model: nn.Module) -> nn.Module:
    """Converts a model, in place, and lets its layers apply the activations and residual adds after them.

    norm -> activation and norm -> add -> activation become one call, where nothing else uses what lies
    between: modules, functions and tensor methods, in place or not, with Identity in between. The activations
    are those of `bnfast.Activation`. Layers, parameters and their names stay; the module whose forward calls
    them gets a subclass of its class, under the same name. It takes the original forward wherever that may
    have come to differ: other plain attributes, other children, hooks, other arguments.

    A forward is replaced by what torch.fx records of it. What it does beside tensors (printing, reading
    and writing globals) is not recorded, and one that asks whether
    torch.fx or torch.compile is at work is answered for good. Forwards that cannot be traced, or that ask
    for the type of something, are left, and `fusion_report` lists them.

    Returns the model (a new one only if it is itself a layer that was converted).
    """
    model = unfuse(convert(model))
    claimed: set[nn.Module] = set()
    for module in list(model.modules()):
        fuse_block(module, claimed)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """What a call of the model would fuse as it stands now, and why its other layers run by themselves."""
    norms: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, NORMS)
    }
    fused: dict[nn.Module, Fused] = {}
    reasons: dict[nn.Module, str] = {}
    for block_name, block in model.named_modules():
        if isinstance(block, FusedBlock):
            live, lost = live_sites(block)
            for site in live:
                norm = block.get_submodule(site.norm)
                fused.setdefault(norm, Fused(norms[norm], site.activation, site.residual, block_name))
            reasons |= {block.get_submodule(name): why for name, why in lost.items()}
    for block in reversed(list(model.modules())):  # a Sequential knows more of its layers than what is around
        found = plan(block, set())
        if found is not None:
            possible = {site.norm: "not fused: bnfast.fuse does it" for site in found.sites}
            for name, why in (found.skipped | possible).items():
                reasons.setdefault(block.get_submodule(name), why)
    skipped = (
        Skipped(name, reasons.get(norm, "no block calls it"))
        for norm, name in norms.items()
        if norm not in fused
    )
    return FusionReport(tuple(fused[norm] for norm in norms if norm in fused), tuple(skipped))
