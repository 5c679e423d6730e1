"""Reports which normalization layers of a model are fused, and why the others are not."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from torch import nn

from ..convert import _counterpart, _obstacle
from ..kernels.epilogue import Activation
from ..modules.mixins import NormMixin
from .blocks import FusedBlock, live_sites
from .layers import NORMS
from .patterns import THE_OUTPUT
from .survey import norms_within_reach, plan


class Fused(NamedTuple):
    """A layer that applies the activation behind it.

    Attributes:
        norm (str): The layer's name in the model.
        activation (Activation): What it applies.
        residual (bool): Whether an add comes before the activation.
        block (str or None): The module whose forward calls the layer, "" for the model itself. None for an
            activation that is the layer's own, whoever calls it.
    """

    norm: str
    activation: Activation
    residual: bool
    block: str | None

    def __str__(self) -> str:
        if self.block is None:
            return f"{self.norm}: {self.activation.name} is built in"
        add = "add, " if self.residual else ""
        place = self.block or "the model"
        return f"{self.norm}: {add}{self.activation.name} fused in, in the forward of {place}"


class Skipped(NamedTuple):
    """A layer that runs by itself.

    Attributes:
        norm (str): The layer's name in the model.
        reason (str): Why it runs by itself.
    """

    norm: str
    reason: str


class FusionReport(NamedTuple):
    """Every normalization layer of a model once, in the model's order.

    Attributes:
        fused (tuple of Fused): The layers that apply what follows them.
        skipped (tuple of Skipped): The others, each with a reason.
    """

    fused: tuple[Fused, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        """The number of fused layers, the number of others with each reason, and then each fused layer."""
        names: defaultdict[str, list[str]] = defaultdict(list)
        for norm, reason in self.skipped:
            names[reason].append(norm)
        reasons = sorted(names.items(), key=lambda item: -len(item[1]))
        return "\n".join(
            [
                f"{len(self.fused)} fused, {len(self.skipped)} not",
                *(f"{len(norms)} not: {reason}: {', '.join(norms)}" for reason, norms in reasons),
                *map(str, self.fused),
            ]
        )


def report(model: nn.Module) -> FusionReport:
    norms: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if isinstance(m, NORMS)}
    fused = {}
    for norm, name in norms.items():
        own = Activation.of(norm.activation) if type(norm).forward is NormMixin.forward else None
        if own is not None:
            fused[norm] = Fused(name, own, False, None)
    reasons = {norm: reason for norm in norms if (reason := _why_not_converted(norm)) is not None}
    last: dict[nn.Module, str] = {}
    for name, block in model.named_modules():
        if isinstance(block, FusedBlock):
            live, lost = live_sites(block)
            for site in live:
                norm = block.get_submodule(site.norm)
                fused.setdefault(norm, Fused(norms[norm], site.activation, site.residual, name))
            for path, reason in lost.items():
                reasons.setdefault(block.get_submodule(path), reason)
    for block in reversed(list(model.modules())):
        if any(norm not in fused and norm not in reasons for _, norm in norms_within_reach(block)):
            _explain(block, reasons, last)
    reasons = last | reasons
    left = ((norm, name) for norm, name in norms.items() if norm not in fused)
    skipped = tuple(Skipped(name, reasons.get(norm, "no block calls it")) for norm, name in left)
    return FusionReport(tuple(fused[norm] for norm in norms if norm in fused), skipped)


def _explain(block: nn.Module, reasons: dict[nn.Module, str], last: dict[nn.Module, str]) -> None:
    """Adds the reasons that a block gives for its layers. A Sequential comes before the blocks around it, for
    it has the more exact reasons, except for the use of its output: those go to `last`."""
    found = plan(block, set())
    if found is None:
        return
    possible = {site.norm: "not fused: bnfast.fuse does it" for site in found.sites}
    for path, reason in (found.skipped | possible).items():
        (last if reason == THE_OUTPUT else reasons).setdefault(block.get_submodule(path), reason)


def _why_not_converted(norm: nn.Module) -> str | None:
    """Why a layer that bnfast has a class for was not converted; None for other layers."""
    target = _counterpart(type(norm))
    obstacle = None if target is None else _obstacle(norm, target)
    if obstacle is not None:
        return f"it is left as it is: {obstacle}"
    return None if target is None else "bnfast.fuse (or bnfast.convert) has not been called"
