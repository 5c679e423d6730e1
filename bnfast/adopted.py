"""Layers of other libraries on bnfast's kernels, and torch.nn's layers in the place of bnfast's.

The class of the former is a subclass of bnfast's and of the library's class, so that the library's own tools
still find them. bnfast.convert gives layers such classes."""

from __future__ import annotations

from functools import cache
from types import FrameType
from typing import Any

from torch import Tensor, nn

from . import modules
from .fusing.layers import hooked, hooked_everywhere
from .kernels.epilogue import MODULES, PARAMETERS, Activation, of_module
from .modules.batchrenorm import _BatchRenorm
from .modules.mixins import NormMixin, is_ours

# timm's own copies of torch.nn's activations, as far as it makes them with the torch versions served here
_TIMM_ACTIVATIONS = {"Sigmoid": "sigmoid", "Tanh": "tanh", "GELU": "gelu", "GELUTanh": "gelu_tanh"}
_RENORMS = {getattr(modules, f"BatchRenorm{n}d"): getattr(nn, f"BatchNorm{n}d") for n in (1, 2, 3)}
_KEEPING = ("convert_sync_batchnorm", "freeze_batch_norm_2d")  # timm's functions that take act and drop along


class Adopted(NormMixin):
    """The first base of a class that has bnfast's and the library's class as its other bases."""

    ours: type[NormMixin]
    theirs: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # No module holds the class of both, so pickle and copy have it made again.
        if not is_adopted(type(self)):
            return super().__reduce_ex__(protocol)
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _blank, (self.ours, self.theirs), *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script gets the library's layer."""
        if self.__dict__.get("activation") is not None:  # given since: the library's layer knows none
            return super().__prepare_scriptable__()
        module: nn.Module = object.__new__(self.theirs)
        module.__dict__ = dict(self.__dict__)
        return module


class Applying(Adopted):
    """timm's layers have two modules, `drop` and `act`, which are called after the normalization. They stay
    in place, and are called where the kernels cannot compute what they do now."""

    @property
    def activation(self) -> Any:
        """The Activation that `act` applies; `act` itself where it has to be called."""
        act, drop = self._modules.get("act"), self._modules.get("drop")
        if type(drop) is not nn.Identity or hooked(drop) or hooked_everywhere():
            return act
        if type(act) is nn.Identity:
            return act if hooked(act) else None
        known = None if act is None or hooked(act) else activation_of(act)
        return act if known is None else known

    @activation.setter
    def activation(self, value: Any) -> None:
        self.act = as_module(Activation.of(value))

    def normalize(self, input: Tensor, activation: Any, residual: Tensor | None) -> Tensor:
        if not isinstance(activation, nn.Module):
            return super().normalize(input, activation, residual)
        output: Tensor = self.act(self.drop(super().normalize(input, None, residual)))  # type: ignore[operator]
        return output

    def extra_repr(self) -> str:
        return super(NormMixin, self).extra_repr()  # whose children are shown

    def _lost_in(self, by: str, caller: FrameType) -> str | None:
        timms = caller.f_globals.get("__name__") == "timm.layers.norm_act"
        if (timms and by in _KEEPING) or self.activation is None:
            return None
        return (
            f"applies {type(self.act).__name__} itself, which the layer that {by} builds in its place does "
            f"not: use timm's {' or '.join(_KEEPING)}, which keep it, or bnfast.revert first if that is meant"
        )


@cache
def both(ours: type[NormMixin], theirs: type[nn.Module]) -> type[Adopted]:
    """The class of a library's layer on bnfast's kernels; always the same for the same two classes."""
    mixin = Applying if theirs.__name__.endswith(("Act", "Act2d")) else Adopted
    members: dict[str, Any] = {
        "__module__": ours.__module__,
        "__qualname__": ours.__qualname__,
        "__doc__": f"{theirs.__module__}.{theirs.__qualname__} on bnfast's kernels.",
        "ours": ours,
        "theirs": theirs,
    }
    if theirs.__module__.startswith("detectron2."):
        members["keep_dtype"] = True  # its output has the input's dtype
    return type(ours.__name__, (mixin, ours, theirs), members)


def is_adopted(kind: type) -> bool:
    """Whether `both` has made a class; False for subclasses of such."""
    return issubclass(kind, Adopted) and "theirs" in vars(kind)


def activation_of(act: nn.Module | None) -> Activation | None:
    """The activation that a module of timm's layer applies; None also for one that bnfast does not know."""
    known = of_module(act)
    if known is None and type(act).__module__ == "timm.layers.activations":
        known = Activation.of(_TIMM_ACTIVATIONS.get(type(act).__name__))
    return known


def as_module(activation: Activation | None) -> nn.Module:
    """torch.nn's module for an activation."""
    if activation is None:
        return nn.Identity()
    name, parameter = activation
    if name in PARAMETERS:
        return nn.LeakyReLU(parameter) if name == "leaky_relu" else nn.ELU(parameter)
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    made: nn.Module = next(kind() for kind in MODULES if kind.__name__.lower() == name)
    return made


def _blank(ours: Any, theirs: Any) -> nn.Module:
    """Makes the object that pickle and copy fill with a layer's state."""
    return object.__new__(both(ours, theirs))


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
