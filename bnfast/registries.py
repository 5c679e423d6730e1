"""Adds bnfast's layers to the registries in which torch and other libraries look up a layer's exact class.

None of these libraries is imported here, and newer versions of torch may not have torch.ao.quantization. A
registry is filled when its module is loaded: at once, or right after its import. If it were filled when a
layer is made, converted or called, layers that existed before the library was imported would be missing, and
a model is validated, folded or quantized before it is called.

What folds and quantizes one of bnfast's layers works on torch.nn's layer, its twin, which shares the
parameters: the modules that quantization makes hold that layer."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .adopted import Applying, as_module, has_twin, torchs_class, twin
from .convert import convert
from .importing import when_imported
from .kernels.epilogue import Activation
from .modules.frozenbatchnorm import TorchFrozenBatchNorm2d
from .modules.mixins import WHEN_SUBCLASSED, NormMixin, is_ours

_LOG = logging.getLogger("bnfast")
_FOLDED_INTO = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
Enter = Callable[[type[NormMixin]], None]  # adds one class of layers to a registry


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


def _beside_torchs(table: dict[type, Any], make: Callable[[Any, type], Any] | None = None) -> Enter:
    """Adds each class beside torch.nn's with the same entry; or, as subclasses may do more, only bnfast's own
    classes with what `make` makes of that entry and the class."""

    def enter(kind: type[NormMixin]) -> None:
        like = torchs_class(kind)
        if like in table and (make is None or is_ours(kind)):
            table.setdefault(kind, table[like] if make is None else make(table[like], kind))

    return enter


def opacus(validators: Any) -> Enter:
    """Opacus's validator refuses layers that mix samples, and replaces them. It refuses subclasses of
    bnfast's layers too, but does not replace them."""
    refuse = _beside_torchs(validators.ModuleValidator.VALIDATORS)
    replace = _beside_torchs(validators.ModuleValidator.FIXERS, _keeping)

    def enter(kind: type[NormMixin]) -> None:
        refuse(kind)
        replace(kind)

    return enter


def _keeping(fix: Callable[..., Any], kind: type) -> Callable[..., Any]:
    if not issubclass(kind, _BatchNorm):
        return fix

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


# torch folds a BatchNorm into the layer before it, and quantizes


def refuse_activations(fusion: Any) -> None:
    """Makes fuse_conv_bn_eval and fuse_linear_bn_eval raise for a layer with an activation. Both read a
    layer's tensors and call one of these functions of their own module, so replacing them there works for all
    code that has imported the two."""
    fusion.fuse_conv_bn_weights = _checked(fusion.fuse_conv_bn_weights, "fuse_conv_bn_eval")
    fusion.fuse_linear_bn_weights = _checked(fusion.fuse_linear_bn_weights, "fuse_linear_bn_eval")


def _checked(function: Callable[..., Any], caller: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        if frame.f_code.co_name == caller:
            refuse_activation(frame.f_locals.get("bn"), caller)
        return function(*args, **kwargs)

    return checked


def match_ours(optimization: Any) -> None:
    """Makes optimization.fuse find bnfast's layers. It compares classes in one function, which is wrapped."""
    matches = optimization.matches_module_pattern
    told: WeakSet[Any] = WeakSet()  # each call of fuse has its own graph

    @functools.wraps(matches)
    def matches_ours(pattern: Iterable[type], node: Any, modules: dict[str, Any]) -> bool:
        layer = _layer_of(node, modules)
        if layer is None:
            return bool(matches(pattern, node, modules))
        kind = type(layer)
        pattern = [kind if expected is torchs_class(kind) else expected for expected in pattern]
        found = bool(matches(pattern, node, modules))
        if not found or layer.activation is None:
            return found
        if node.graph not in told:
            told.add(node.graph)
            _tell_what_is_left(node.graph, modules)
        return False

    optimization.matches_module_pattern = matches_ours


def _layer_of(node: Any, modules: dict[str, Any]) -> Any:
    """The layer that a node calls, if it has a twin and is called with an input only; or None. A residual
    would be lost."""
    layer = modules.get(node.target) if node.op == "call_module" else None
    return layer if has_twin(layer) and len(node.args) == 1 and not node.kwargs else None


def _tell_what_is_left(graph: Any, modules: dict[str, Any]) -> None:
    called = {node: type(modules.get(node.target)) for node in graph.nodes if node.op == "call_module"}
    layers = {node: layer for node in called if (layer := _layer_of(node, modules)) is not None}
    left = {
        node.target: layer
        for node, layer in layers.items()
        if layer.activation is not None and called.get(node.args[0]) in _FOLDED_INTO
    }
    _LOG.warning(
        "torch.fx's optimizer does not fold %d of the model's layers (%s) into what is before them, which "
        "would lose an activation. %s",
        len(left), ", ".join(left), way_out(any(isinstance(layer, Applying) for layer in left.values())),
    )  # fmt: skip


def fuser_methods(mappings: Any) -> Enter:
    """For fuse_modules and fuse_modules_qat, which look up the classes of the modules that they fuse."""
    table = mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
    theirs = dict(table)

    def enter(kind: type[NormMixin]) -> None:
        like = torchs_class(kind)
        for kinds, method in theirs.items() if is_ours(kind) else ():
            if like in kinds:
                ours = tuple(kind if k is like else k for k in kinds)
                table.setdefault(ours, functools.partial(_fuse_twins, method))

    return enter


def _fuse_twins(method: Callable[..., Any], is_qat: bool, *layers: nn.Module) -> Any:
    return method(is_qat, *(_bare(layer, "fuse_modules", is_qat) for layer in layers))


def _bare(layer: nn.Module, by: str, training: bool = False) -> nn.Module:
    refuse_activation(layer, by)
    return twin(layer, by, training) if isinstance(layer, NormMixin) else layer


def quantized_modules(mappings: Any) -> Enter:
    """For prepare and convert, which look up the module that replaces a layer."""

    def make(theirs: Any, kind: type) -> Any:
        return SimpleNamespace(from_float=functools.partial(_quantized, theirs))

    return _beside_torchs(mappings.DEFAULT_STATIC_QUANT_MODULE_MAPPINGS, make)


def _quantized(kind: Any, layer: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
    return kind.from_float(_bare(layer, "torch.ao.quantization.convert"), use_precomputed_fake_quant)


def graphs(quantize_fx: Any) -> None:
    """For prepare_fx, prepare_qat_fx and fuse_fx. They pass the traced model to one function, and the first
    two pass its result to another, which needs each node's scope. Both are wrapped."""
    fuse, prepare = quantize_fx._fuse_fx, quantize_fx.prepare

    def fuse_twins(model: Any, is_qat: bool, *rest: Any, **named: Any) -> Any:
        return fuse(_with_twins(model, is_qat), is_qat, *rest, **named)

    def prepare_twins(model: Any, mapping: Any, is_qat: bool, scopes: Any, *rest: Any, **named: Any) -> Any:
        for node in model.graph.nodes:
            if node.op == "call_module" and node.name not in scopes:
                scopes[node.name] = (node.target, type(model.get_submodule(node.target)))
        return prepare(model, mapping, is_qat, scopes, *rest, **named)

    quantize_fx._fuse_fx, quantize_fx.prepare = fuse_twins, prepare_twins


def _with_twins(model: Any, is_qat: bool) -> Any:
    """Replaces bnfast's layers of a traced model that are called with an input only by torch.nn's, and their
    activations by modules behind them. A traced model has containers of its own, so the original model does
    not change."""
    modules = dict(model.named_modules())
    for node in list(model.graph.nodes):
        layer = _layer_of(node, modules)
        activation = getattr(layer, "activation", None)
        if layer is None or isinstance(activation, nn.Module):  # timm's, which has hooks or other additions
            continue
        path, _, name = node.target.rpartition(".")
        setattr(model.get_submodule(path), name, twin(layer, "prepare_qat_fx", is_qat))
        if activation is None:
            continue
        behind = f"{node.target}_activation"
        model.add_submodule(behind, as_module(activation).train(layer.training))
        with model.graph.inserting_after(node):
            call = model.graph.call_module(behind, (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
    model.recompile()
    return model


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


# by module: a function that is called with the module, and may return one that adds a class
_REGISTRIES: dict[str, Callable[[Any], Enter | None]] = {
    "torch.nn.utils.fusion": refuse_activations,
    "torch.fx.experimental.optimization": match_ours,
    "torch.ao.quantization.fuser_method_mappings": fuser_methods,
    "torch.ao.quantization.quantization_mappings": quantized_modules,
    "torch.ao.quantization.quantize_fx": graphs,
    "opacus.validators": opacus,
    "captum.attr._core.deep_lift": captum,
    # counters of operations
    "thop.profile": lambda profile: _beside_torchs(profile.register_hooks),
    "ptflops.pytorch_ops": lambda ops: _beside_torchs(ops.MODULES_MAPPING),
}
