"""Stand-in for the real converter: exact torch.nn normalization types become bnfast's."""

from __future__ import annotations

from torch import nn

from . import modules

_OURS = {getattr(nn, name): getattr(modules, name) for name in modules.__all__ if hasattr(nn, name)}


def convert(model: nn.Module) -> nn.Module:
    """In place: gives the model back."""
    for module in model.modules():
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
    return model


def revert(model: nn.Module) -> nn.Module:
    """In place: gives the model back."""
    from .fuse import unfuse

    theirs = {ours: plain for plain, ours in _OURS.items()}
    for module in unfuse(model).modules():
        if type(module) in theirs:
            module.__class__ = theirs[type(module)]
    return model
