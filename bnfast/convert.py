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
from .adopted import activation_of, both, is_adopted
from .fusing.blocks import unfuse
from .fusing.layers import NORMS, hooked
from .importing import catch_up
from .modules import plain
from .modules.drop_in import DropIn
from .modules.frozenbatchnorm import TorchFrozenBatchNorm2d

_LOG = logging.getLogger("bnfast")

_TORCH: dict[type[nn.Module], type[DropIn]] = {
    getattr(nn, name): getattr(modules, name) for name in modules.__all__ if hasattr(nn, name)
} | {TorchFrozenBatchNorm2d: modules.FrozenBatchNorm2d}
_THEIRS = {ours: kind for kind, ours in _TORCH.items()} | {
    getattr(modules, f"BatchRenorm{n}d"): getattr(nn, f"BatchNorm{n}d") for n in (1, 2, 3)
}
_PLAIN = {getattr(plain, ours.__name__): ours for ours in _TORCH.values()}
# Known by name, for bnfast depends on none of these libraries.
_ELSEWHERE: dict[str, type[DropIn]] = {
    "torchvision.ops.misc.FrozenBatchNorm2d": modules.FrozenBatchNorm2d,
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": modules.FrozenBatchNorm2d,
    "timm.layers.norm_act.BatchNormAct2d": modules.BatchNorm2d,
    "timm.layers.norm_act.FrozenBatchNormAct2d": modules.FrozenBatchNorm2d,
    "timm.layers.norm_act.GroupNormAct": modules.GroupNorm,
    "timm.layers.norm_act.GroupNorm1Act": modules.GroupNorm,
    "timm.layers.norm_act.LayerNormAct": modules.LayerNorm,
    "timm.layers.norm.GroupNorm": modules.GroupNorm,
    "timm.layers.norm.GroupNorm1": modules.GroupNorm,
    "timm.layers.norm.LayerNorm": modules.LayerNorm,
}


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
        if target is None:
            if _is_norm(module) and not isinstance(module, DropIn):
                log.left(name, module, _why_unknown(module))
            continue
        obstacle = _obstacle(module, target)
        if obstacle:
            log.left(name, module, obstacle)
            continue
        before = type(module)
        module.__class__ = target
        log.changed(before, module)
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
    unfuse(model)
    for name, module in list(model.named_modules()):
        before, after = type(module), _restored(module)
        if after is None:
            if isinstance(module, DropIn) and before not in _PLAIN:
                log.left(name, module, "a subclass of bnfast's")
            continue
        if before.__name__.startswith("BatchRenorm"):
            log.unlike.append(name or "the model")
        module.__class__ = after
        log.changed(before, module)
    log.write()
    return model


def _restored(module: Any) -> type[nn.Module] | None:
    """The class that one of bnfast's layers is reverted to, or None for a subclass of them."""
    kind = type(module)
    adopted = is_adopted(kind)
    if not adopted and kind not in _THEIRS:
        return None
    # timm's layers have no such entry: their `activation` is read from modules that their own class calls.
    activation = module.__dict__.pop("activation", None)
    if activation is None:
        return kind.theirs if adopted else _THEIRS[kind]
    module.activation = activation
    if adopted and getattr(kind, "keep_dtype", False):
        module.keep_dtype = True
    name = "BatchNorm" + kind.__name__[-2:] if kind.__name__.startswith("BatchRenorm") else kind.__name__
    applying: type[nn.Module] = getattr(plain, name)
    return applying


def _counterpart(kind: type) -> type[DropIn] | None:
    """bnfast's class for exactly this one."""
    found = _TORCH.get(kind) or _PLAIN.get(kind)
    if found is None and getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind:
        ours = _ELSEWHERE.get(_called(kind))
        found = both(ours, kind) if ours else None
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether a user may expect the module to be converted: an instance of one of torch.nn's layers, or a
    module with "Norm" in its name that has parameters or buffers of its own, which containers do not have."""
    if isinstance(module, (*NORMS, nn.RMSNorm, nn.LocalResponseNorm)):
        return True
    name = getattr(module, "original_name", "") or type(module).__name__  # torch.jit's modules have the first
    if "Norm" not in name or type(module).__module__.startswith("torch.nn.utils."):
        return False
    return any(True for own in (module.parameters, module.buffers) for _ in own(recurse=False))


def _why_unknown(module: nn.Module) -> str:
    if isinstance(module, LazyModuleMixin):
        return "lazy: convert the model after its first batch"
    if is_parametrized(module):
        return "parametrized"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit"
    bases = [kind for kind in type(module).__mro__ if kind in _TORCH]
    return f"a subclass of torch.nn.{bases[0].__name__}" if bases else "bnfast has no such layer"


def _obstacle(module: nn.Module, target: type[DropIn]) -> str | None:
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
        self.unlike: list[str] = []  # names of layers that now compute something else
        self._changes: Counter[str] = Counter()
        self._left: defaultdict[str, list[str]] = defaultdict(list)

    def changed(self, before: type, module: nn.Module) -> None:
        self._changes[f"{_called(before)} -> {_called(type(module))}"] += 1

    def left(self, name: str, module: nn.Module, reason: str) -> None:
        self._left[f"{_called(type(module))} ({reason})"].append(name or "the model")

    def write(self) -> None:
        changes = "".join(f"; {count} {change}" for change, count in self._changes.items())
        total = sum(len(names) for names in self._left.values())
        _LOG.info("%s: %d layers%s; %d left alone", self.what, self._changes.total(), changes, total)
        for reason, names in self._left.items():
            _LOG.info("%s: left alone: %d %s: %s", self.what, len(names), reason, ", ".join(names))
        if self.unlike:
            _LOG.warning(
                "%s: Batch Renormalization became BatchNorm, which is equal in eval only: %s",
                self.what,
                ", ".join(self.unlike),
            )


def _called(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
