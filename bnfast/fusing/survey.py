"""Which blocks a model has, what can be fused in each, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.fx import Node

from . import blocks
from .call_site import Site, rewrite, site_of
from .layers import NORMS, hooked
from .patterns import Match, find
from .tracing import Traced, Untraceable, is_sequence, trace


class Plan(NamedTuple):
    """What was found out about one block; paths of layers are the block's."""

    traced: Traced | None
    matches: list[Match]
    sites: tuple[Site, ...]
    skipped: dict[str, str]


def norms_within_reach(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers that a block's forward may call: its children, those in lists among them, and the last of
    Sequentials among them. What is further inside a Sequential is that one's to call."""
    for name, child in block.named_children():
        if isinstance(child, NORMS):
            yield prefix + name, child
        elif type(child) in (nn.ModuleList, nn.ModuleDict):
            yield from norms_within_reach(child, f"{prefix}{name}.")
    for name, norm, _ in _trailing(block):
        yield prefix + name, norm


def plan(block: nn.Module, claimed: set[nn.Module]) -> Plan | None:
    """claimed: layers whose calls an outer block has taken over. None if nothing within reach is left."""
    reach = {name: norm for name, norm in norms_within_reach(block) if norm not in claimed}
    if not reach:
        return None
    reason = blocks.why_not_subclassed(block)
    try:
        if reason is not None:
            raise Untraceable(reason)
        traced, matches, skipped = _trace_with_sequences(block)
    except Untraceable as why:
        return Plan(None, [], (), dict.fromkeys(reach, f"its block is left as it is: {why}"))
    modules = dict(block.named_modules(remove_duplicate=False))
    kept = [match for match in matches if modules[str(match.norm.target)] not in claimed]
    reasons = {str(node.target): why for node, why in skipped.items()}
    return Plan(traced, kept, tuple(map(site_of, kept)), reasons)


def _trace_with_sequences(block: nn.Module) -> tuple[Traced, list[Match], dict[Node, str]]:
    """A Sequential that ends in a layer becomes part of the block's graph if an activation follows there."""
    modules = dict(block.named_modules(remove_duplicate=False))
    inlined = {module for _, _, chain in _trailing(block) for module in chain}
    while True:
        traced = trace(block, inlined)
        matches, skipped = find(traced.graph, modules)
        useful = {m for match in matches for m in _around(str(match.norm.target), modules)} & inlined
        if useful == inlined:
            return traced, matches, skipped
        inlined = useful


def _trailing(block: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Layers that end a Sequential among a block's children, or one that ends such a Sequential in turn; with
    these Sequentials."""
    for name, child in block.named_children():
        chain = []
        while is_sequence(child) and child._modules and not hooked(child):
            chain.append(child)
            last = next(reversed(child._modules))
            name, child = f"{name}.{last}", child.get_submodule(last)
        if chain and isinstance(child, NORMS):
            yield name, child, chain


def _around(path: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    parts = path.split(".")
    return (modules[".".join(parts[:i])] for i in range(1, len(parts)))


def fuse_block(block: nn.Module, claimed: set[nn.Module] | None = None) -> None:
    """Rewrites one block's call sites, where it has any. claimed: grows by the layers that it takes over."""
    claimed = set() if claimed is None else claimed
    found = plan(block, claimed)
    if found is None or found.traced is None or not found.sites:
        return
    claimed |= {block.get_submodule(site.norm) for site in found.sites}
    for match, site in zip(found.matches, found.sites, strict=True):
        rewrite(found.traced.graph, match, site)
    blocks.install(block, found.traced, found.sites)
