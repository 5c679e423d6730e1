"""convert and revert: normalization layers of a model become bnfast's in place, and go back.

A layer keeps its object and gets another class, as lazy and parametrized layers do in torch. A new object
would have to take the old one's place under every name in the model, in every list beside it, in what its
hooks hold, and in the caller's own variables. This way parameters, buffers, hooks, flags and other attributes
are not copied, so none is forgotten. The two classes must have objects with the same attributes. So a layer
is left alone if it has another attribute that bnfast's class would read, or if its exact class is not
known."""

from __future__ import annotations

import logging
import sys
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from . import modules
from .adopted import activation_of, both, is_adopted, torchs_class
from .fusing.blocks import unfuse
from .fusing.layers import NORMS, hooked
from .importing import catch_up
from .modules import plain
from .modules.batchrenorm import _BatchRenorm
from .modules.frozenbatchnorm import TorchFrozenBatchNorm2d
from .modules.mixins import NormMixin

_LOG = logging.getLogger("bnfast")

_OURS: tuple[type[NormMixin], ...] = tuple(getattr(modules, name) for name in modules.__all__)
_THEIRS = {ours: torchs_class(ours) or TorchFrozenBatchNorm2d for ours in _OURS}
_TORCH = {theirs: ours for ours, theirs in _THEIRS.items() if not issubclass(ours, _BatchRenorm)}
_PLAIN = {getattr(plain, ours.__name__): ours for ours in _TORCH.values()}
# Known by name, for bnfast depends on none of these libraries. bnfast's names lack timm's "Act" and "1".
_ELSEWHERE = {
    "torchvision.ops.misc": ("FrozenBatchNorm2d",),
    "detectron2.layers.batch_norm": ("FrozenBatchNorm2d",),
    "timm.layers.norm_act": (
        "BatchNormAct2d", "FrozenBatchNormAct2d", "GroupNormAct", "GroupNorm1Act", "LayerNormAct",
    ),
    "timm.layers.norm": ("GroupNorm", "GroupNorm1", "LayerNorm"),
}  # fmt: skip


def convert(model: nn.Module) -> nn.Module:
    """Makes bnfast's layers of a model's normalization layers, in place.

    These layers are converted, by exact type: torch.nn's BatchNorm1d/2d/3d, GroupNorm, InstanceNorm1d/2d/3d
    and LayerNorm; torchvision's and detectron2's FrozenBatchNorm2d; timm's BatchNormAct2d,
    FrozenBatchNormAct2d, GroupNormAct, GroupNorm1Act and LayerNormAct, whose activation the kernels apply,
    and timm's GroupNorm, GroupNorm1 and LayerNorm. Layers of these libraries stay instances of their own
    classes as well, so that the libraries' freezers and converters find what they look for.

    Parameters, buffers, hooks, flags, dtype, device and state_dict keys stay, so the optimizer may have been
    made before. FSDP and torch.jit.script come after, since they replace classes themselves.

    Left alone are subclasses, lazy, parametrized and pruned layers, layers whose activation the kernels do
    not know, and all kinds that bnfast does not have. What was converted, and what was left alone and why,
    goes to the logger "bnfast" at level INFO.

    Args:
        model (nn.Module): The model, or a single layer. It is changed in place.

    Returns:
        The model.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> layer = model[1]
        >>> bnfast.convert(model)[1] is layer
        True
        >>> type(layer)
        <class 'bnfast.modules.batchnorm.BatchNorm2d'>
    """
    log = _Log("convert", model)
    catch_up()
    for name, module in list(model.named_modules()):
        target = _counterpart(type(module))
        reason = _why_unknown(module) if target is None else _obstacle(module, target)
        if reason is not None:
            log.left(name, module, reason)
        elif target is not None:
            log.change(module, target)
    log.write()
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undoes `fuse` and `convert`, in place: layers become torch.nn's, or what they were converted from.

    A layer that carries an activation and was not converted from another library's becomes one of
    bnfast.modules.plain: torch.nn's layer with the activation behind it and the same state_dict keys. It
    still takes a residual, which torch.nn's layers do not. Batch Renormalization becomes BatchNorm, which is
    equal in eval only: a warning says so. Torch has no frozen BatchNorm, so one that was not converted
    becomes bnfast's own in plain torch. Subclasses of bnfast's layers are left alone. The logger "bnfast"
    reports as for `convert`.

    Args:
        model (nn.Module): The model, or a single layer. It is changed in place.

    Returns:
        The model.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Example:
        >>> model = bnfast.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        >>> type(bnfast.revert(model)[1]) is nn.BatchNorm2d
        True
    """
    log = _Log("revert", model)
    unlike: list[str] = []  # names of layers that now compute something else
    unfuse(model)
    for name, module in list(model.named_modules()):
        kind = type(module)
        if is_adopted(kind) or kind in _THEIRS:
            if issubclass(kind, _BatchRenorm):
                unlike.append(name or "the model")
            log.change(module, _restored(module))
        elif isinstance(module, NormMixin) and kind not in _PLAIN:
            log.left(name, module, "a subclass of bnfast's")
    log.write()
    if unlike:
        _LOG.warning(
            "revert: Batch Renormalization became BatchNorm, which is equal in eval only: %s",
            ", ".join(unlike),
        )
    return model


def _restored(module: Any) -> type[nn.Module]:
    """The class that one of bnfast's layers is reverted to."""
    kind = type(module)
    # timm's layers have no such entry: their `activation` is read from modules that their own class calls.
    activation = module.__dict__.pop("activation", None)
    if activation is None:
        theirs: type[nn.Module] = kind.theirs if is_adopted(kind) else _THEIRS[kind]
        return theirs
    module.activation = activation
    if getattr(kind, "keep_dtype", False):
        module.keep_dtype = True
    applying: type[nn.Module] = getattr(plain, kind.__name__.replace("Renorm", "Norm"))
    return applying


def _counterpart(kind: type) -> type[NormMixin] | None:
    """bnfast's class for exactly this one."""
    name = kind.__qualname__
    found = _TORCH.get(kind) or _PLAIN.get(kind)
    theirs = getattr(sys.modules.get(kind.__module__), name, None)
    if theirs is kind and name in _ELSEWHERE.get(kind.__module__, ()):
        found = both(getattr(modules, name.replace("Act", "").replace("1", "")), kind)
    return found


def _why_unknown(module: nn.Module) -> str | None:
    """Why bnfast has no class for a module; None where no user expects one. One does for an instance of one
    of torch.nn's layers, and for a module with "Norm" in its name that has parameters or buffers of its own,
    which containers do not have."""
    if isinstance(module, NormMixin):
        return None
    if not isinstance(module, (*NORMS, nn.RMSNorm, nn.LocalResponseNorm)):
        name = getattr(module, "original_name", "") or type(module).__name__  # torch.jit's have the first
        if "Norm" not in name or type(module).__module__.startswith("torch.nn.utils."):
            return None
        if not any(True for own in (module.parameters, module.buffers) for _ in own(recurse=False)):
            return None
    if isinstance(module, LazyModuleMixin):
        return "lazy: convert the model after its first batch"
    if is_parametrized(module):
        return "parametrized"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit"
    bases = [kind for kind in type(module).__mro__ if kind in _TORCH]
    return f"a subclass of torch.nn.{bases[0].__name__}" if bases else "bnfast has no such layer"


def _obstacle(module: nn.Module, target: type[NormMixin]) -> str | None:
    """Why a layer of a known class would compute something else as one of bnfast's, or None."""
    held: set[str] = set(module.__dict__).union(module._parameters, module._buffers, module._modules)
    read = (set(dir(target)) - set(dir(type(module))) - {"affine"}) | {"forward"}
    if held & read:
        return f"it has attributes of its own: {', '.join(sorted(held & read))}"
    if not held.difference(module.__dict__).issuperset(("weight", "bias")):
        return "its parameters are computed, by a parametrization or by pruning"
    act, drop = module._modules.get("act"), module._modules.get("drop")
    if getattr(module, "_fast_norm", False):
        return "timm's fast norm is on, which chooses dtypes of its own"
    if drop is not None and type(drop) is not nn.Identity:
        return f"its dropout, {type(drop).__name__}"
    if act is not None and type(act) is not nn.Identity and activation_of(act) is None:
        return f"its activation, {type(act).__name__}, is not among bnfast's"
    if any(part is not None and hooked(part) for part in (act, drop)):
        return "hooks on its activation or dropout"
    return None


class _Log:
    """The log of one call: a line for all changes, and a line for each reason to leave layers alone."""

    def __init__(self, what: str, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"bnfast.{what} takes a torch.nn.Module, but got {type(model).__name__}")
        self.what = what
        self._changes: Counter[str] = Counter()
        self._left: defaultdict[str, list[str]] = defaultdict(list)

    def change(self, module: nn.Module, kind: type[nn.Module]) -> None:
        self._changes[f"{_called(type(module))} -> {_called(kind)}"] += 1
        module.__class__ = kind

    def left(self, name: str, module: nn.Module, reason: str) -> None:
        self._left[f"{_called(type(module))} ({reason})"].append(name or "the model")

    def write(self) -> None:
        changes = "".join(f"; {count} {change}" for change, count in self._changes.items())
        total = sum(len(names) for names in self._left.values())
        _LOG.info("%s: %d layers%s; %d left alone", self.what, self._changes.total(), changes, total)
        for reason, names in self._left.items():
            _LOG.info("%s: left alone: %d %s: %s", self.what, len(names), reason, ", ".join(names))


def _called(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
