"""Makes torch.nn's layers that share parameters and buffers with bnfast's."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import modules
from .adopted import Applying
from .modules.batchrenorm import _BatchRenorm
from .modules.mixins import NormMixin, is_ours

_RENORMS = {getattr(modules, f"BatchRenorm{n}d"): getattr(nn, f"BatchNorm{n}d") for n in (1, 2, 3)}


def torchs_class(kind: type) -> type[nn.Module] | None:
    """torch.nn's class that a layer's class derives from or, for Batch Renormalization, is equal to in eval;
    or None."""
    for base in kind.__mro__:
        if base in _RENORMS:
            return _RENORMS[base]
        if base is not nn.Module and getattr(nn, base.__name__, None) is base:
            return base
    return None


def has_twin(layer: object) -> bool:
    """Whether `twin` computes the same as a layer, except for its activation. Subclasses may compute other
    things."""
    return isinstance(layer, NormMixin) and is_ours(type(layer)) and torchs_class(type(layer)) is not None


def twin(layer: NormMixin, by: str, training: bool = False) -> nn.Module:
    """Makes torch.nn's layer with the same parameters and buffers, and without the activation, which the
    caller has to apply. by: the caller's name. training: whether the new layer will be trained."""
    if training and isinstance(layer, _BatchRenorm):
        raise RuntimeError(
            f"{by} would train a BatchNorm in the place of {type(layer).__name__}: use bnfast.revert(model) "
            "first if that is meant"
        )
    kind: Any = torchs_class(type(layer))
    new: nn.Module = object.__new__(kind)
    new.__dict__ = {
        name: dict(value) if type(value) is dict else value for name, value in vars(layer).items()
    }
    new.__dict__.pop("activation", None)
    for part in ("act", "drop"):  # timm's, which its own class calls
        new._modules.pop(part, None)
    return new


def refuse_activation(layer: object, by: str) -> None:
    """Raises RuntimeError if a layer has an activation. For tools that cannot keep one."""
    activation = getattr(layer, "activation", None) if isinstance(layer, NormMixin) else None
    if activation is not None:
        name = getattr(activation, "name", type(activation).__name__)
        raise RuntimeError(
            f"{by} would lose an activation: {type(layer).__name__} applies {name} itself. "
            f"{way_out(isinstance(layer, Applying))}"
        )


def way_out(timms: bool) -> str:
    """The advice for a layer whose activation cannot be kept. timms: whether it is one of timm's layers."""
    if timms:
        return (
            "bnfast.revert(model) gives back timm's own layers, whose activation torch does not take along "
            "either: apply it in a module behind a layer whose act is torch.nn.Identity()"
        )
    return (
        "Make the layer without activation= and apply that in a module behind it, which bnfast.fuse takes in"
    )
