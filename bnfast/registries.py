"""Adds bnfast's layers to the registries in which torch and other libraries look up a layer's exact class.

None of these libraries is imported here. A registry is filled when its module is loaded: at once, or right
after its import. If it were filled when a layer is made, converted or called, layers that existed before the
library was imported would be missing, and a model is validated, folded or quantized before it is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from . import torch_registries
from .adopted import Applying
from .convert import convert
from .importing import when_imported
from .kernels.epilogue import Activation
from .modules.frozenbatchnorm import TorchFrozenBatchNorm2d
from .modules.mixins import WHEN_SUBCLASSED, NormMixin, is_ours
from .torch_registries import Enter
from .twins import torchs_class, twin


def fill() -> None:
    """Fills each registry as soon as its module is loaded."""
    for name, begin in _REGISTRIES.items():
        when_imported(name, functools.partial(_fill, begin))


def _fill(begin: Callable[[Any], Enter | None], module: Any) -> None:
    enter = begin(module)
    if enter is None:
        return
    kinds: list[type[NormMixin]] = [NormMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for kind in kinds[1:]:
        enter(kind)
    WHEN_SUBCLASSED.append(enter)


def opacus(validators: Any) -> Enter:
    """Opacus's validator refuses layers that mix samples, and replaces them. Subclasses of bnfast's layers
    mix samples too, but may do more than their replacement, so they are refused and not replaced."""
    errors, fixers = validators.ModuleValidator.VALIDATORS, validators.ModuleValidator.FIXERS

    def enter(kind: type[NormMixin]) -> None:
        like = torchs_class(kind)
        if like in errors:
            errors.setdefault(kind, errors[like])
        if like in fixers and is_ours(kind):
            fixers.setdefault(kind, _keeping(fixers[like]) if issubclass(kind, _BatchNorm) else fixers[like])

    return enter


def _keeping(fix: Callable[..., Any]) -> Callable[..., Any]:
    def fixed(layer: NormMixin, **arguments: Any) -> Any:
        activation: Any = layer.activation
        new = fix(twin(layer, "Opacus"), **arguments)
        if activation is None:
            return new
        if not isinstance(activation, Activation):  # timm's module, which has hooks or other additions
            raise ValueError(
                f"{type(activation).__name__}, which {type(layer).__name__} calls, would be lost: use "
                "bnfast.revert(model) and replace the layers that Opacus does not take yourself"
            )
        convert(new)
        new.activation = activation
        return new

    return fixed


def captum(deep_lift: Any) -> Enter:
    """DeepLift has rules for activations, and treats all other layers as linear. A BatchNorm in eval and its
    activation are elementwise, so the rule of activations is right for the two together."""
    table, rule = deep_lift.SUPPORTED_NON_LINEAR, deep_lift.nonlinear

    def multiplier(layer: Any, inputs: Any, outputs: Any, dx: Any, dy: Any, eps: float = 1e-10) -> Any:
        if layer.activation is None:
            return dx
        if not isinstance(layer, TorchFrozenBatchNorm2d) and (
            layer.training or not isinstance(layer, _BatchNorm)
        ):
            raise RuntimeError(
                f"DeepLift has no rule for {type(layer).__name__} with an activation of its own (a "
                "BatchNorm's is right in eval): apply the activation in a module behind the layer"
            )
        return rule(layer, inputs, outputs, dx, dy, eps)

    def enter(kind: type[NormMixin]) -> None:
        if not issubclass(kind, Applying):  # its act is a module with a rule of its own
            table.setdefault(kind, multiplier)

    return enter


def _beside_torchs(table: dict[type, Any]) -> Enter:
    """Counters of operations count bnfast's layers as torch.nn's."""

    def enter(kind: type[NormMixin]) -> None:
        like = torchs_class(kind)
        if like in table:
            table.setdefault(kind, table[like])

    return enter


# by module: a function that is called with the module, and may return one that adds a class
_REGISTRIES: dict[str, Callable[[Any], Enter | None]] = {
    "torch.nn.utils.fusion": torch_registries.refuse_activations,
    "torch.fx.experimental.optimization": torch_registries.match_ours,
    "torch.ao.quantization.fuser_method_mappings": torch_registries.fuser_methods,
    "torch.ao.quantization.quantization_mappings": torch_registries.quantized_modules,
    "torch.ao.quantization.quantize_fx": torch_registries.graphs,
    "opacus.validators": opacus,
    "captum.attr._core.deep_lift": captum,
    "thop.profile": lambda profile: _beside_torchs(profile.register_hooks),
    "ptflops.pytorch_ops": lambda ops: _beside_torchs(ops.MODULES_MAPPING),
}
