"""Finds the blocks of a model, what can be fused in each, and why the rest cannot."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from torch import nn

from . import blocks
from .blocks import Variant
from .call_site import Site
from .guards import is_mode, is_sequence
from .layers import NORMS, hooked
from .patterns import Match, find
from .subclassing import Unannounced, subclass
from .tracing import Traced, trace
from .values import Refusal

_LOG = logging.getLogger("bnfast")


class Plan(NamedTuple):
    """What was found in one block. Paths of layers are relative to the block."""

    variant: Variant | None  # None where there is nothing to fuse
    skipped: dict[str, str]
    left: str | None = None  # why the whole block is left as it is
    reads_mode: bool = False  # whether the plan may differ between training and eval

    @property
    def sites(self) -> tuple[Site, ...]:
        return () if self.variant is None else self.variant.sites


def norms_within_reach(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers that a block's forward may call: its children, the entries of lists among its
    children, and the last layer of each Sequential among them. The Sequential itself calls what is further
    inside it."""
    for name, child in block.named_children():
        if isinstance(child, NORMS):
            yield prefix + name, child
        elif type(child) in (nn.ModuleList, nn.ModuleDict):
            yield from norms_within_reach(child, f"{prefix}{name}.")
    for name, norm, _ in _trailing(block):
        yield prefix + name, norm


def plan(block: nn.Module, claimed: set[nn.Module]) -> Plan | None:
    """Plans what to fuse in a block. claimed: layers whose calls an outer block has taken over. None if no
    layer within reach is left."""
    reach = {name: norm for name, norm in norms_within_reach(block) if norm not in claimed}
    if not reach:
        return None
    try:
        blocks.refuse_class(block)
        traced, matches, reasons = _trace_with_sequences(block)
    except Refusal as why:
        return _left(reach, str(why), reads_mode=True)
    modules = dict(block.named_modules(remove_duplicate=False))
    kept = [match for match in matches if modules[str(match.norm.target)] not in claimed]
    reads_mode = any(map(is_mode, traced.guards))
    if not kept:
        return Plan(None, reasons, None, reads_mode)
    try:
        return Plan(blocks.build(traced, kept), reasons, None, reads_mode)
    except Exception as why:
        words = f"the forward that bnfast made of it cannot be built: {type(why).__name__}: {why}"
        _LOG.warning("fuse: %s is left as it is: %s", type(block).__name__, words)
        return _left(reach, words)


def _left(norms: Iterable[str], reason: str, reads_mode: bool = False) -> Plan:
    return Plan(None, dict.fromkeys(norms, f"its block is left as it is: {reason}"), reason, reads_mode)


def _trace_with_sequences(block: nn.Module) -> tuple[Traced, list[Match], dict[str, str]]:
    """Traces a block. A Sequential that ends in a layer becomes part of the block's graph if an activation
    follows it. The reasons cover the layers of all graphs that were tried."""
    reasons: dict[str, str] = {}
    modules = dict(block.named_modules(remove_duplicate=False))
    inlined = {module for _, _, chain in _trailing(block) for module in chain}
    while True:
        traced = trace(block, inlined)
        matches, skipped = find(traced.graph, modules)
        reasons |= {str(node.target): why for node, why in skipped.items()}
        around = (accumulate(str(m.norm.target).split(".")[:-1], "{}.{}".format) for m in matches)
        useful = {modules[path] for paths in around for path in paths} & inlined
        if useful == inlined:
            return traced, matches, reasons
        inlined = useful


def _trailing(block: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Yields the layers that end a Sequential among a block's children, directly or as the end of a nested
    one, each with these Sequentials."""
    for name, child in block.named_children():
        chain = []
        while is_sequence(child) and child._modules and not hooked(child):
            chain.append(child)
            last = next(reversed(child._modules))
            name, child = f"{name}.{last}", child.get_submodule(last)
        if chain and isinstance(child, NORMS):
            yield name, child, chain


def fuse_block(block: nn.Module, claimed: set[nn.Module]) -> str | None:
    """Rewrites the call sites of one block, for training and for inference where these differ. Adds the
    layers whose calls it takes over to `claimed`. Returns why the block is left as it is, or None."""
    found = plan(block, claimed)
    if found is None:
        return None
    plans = [found]
    if found.reads_mode:
        with _in_mode(block, not block.training):
            plans.append(plan(block, claimed) or found)
    variants = tuple(p.variant for p in plans if p.variant is not None)
    if variants:
        claimed |= {block.get_submodule(site.norm) for p in plans for site in p.sites}
        blocks.install(block, variants, _blank)
    return found.left


@contextlib.contextmanager
def _in_mode(block: nn.Module, training: bool) -> Iterator[None]:
    """Sets the mode of all modules, as `train` does, without a call of `train`, which may do more."""
    before = [(m.__dict__, m.__dict__["training"]) for m in block.modules() if "training" in m.__dict__]
    try:
        for held, _ in before:
            held["training"] = training
        yield
    finally:
        for held, was in before:
            held["training"] = was


def _blank(original: type) -> nn.Module:
    """Makes the object that pickle fills with a fused block's state. It is fused again once it has its
    state."""
    waiting = subclass(original, {"_bnfast_original": original}, _Waiting)
    blank: nn.Module = object.__new__(waiting)
    return blank


class _Waiting(Unannounced):
    """The first base of a block's class while pickle or copy makes one."""

    _bnfast_original: Any

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "__class__", self._bnfast_original)
        self.__setstate__(state)
        fuse_block(self, set())
