"""torch's own registries: folding of a BatchNorm into the layer before it (torch.nn.utils.fusion, torch.fx's
optimizer), and torch.ao.quantization, which newer versions of torch may not have.

Quantization of one of bnfast's layers works on torch.nn's layer, which shares the parameters: the modules
that quantization makes hold that layer."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

from torch import nn

from .adopted import Applying, as_module
from .modules.mixins import NormMixin, is_ours
from .twins import has_twin, refuse_activation, torchs_class, twin, way_out

_LOG = logging.getLogger("bnfast")
_FOLDED_INTO = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
Enter = Callable[[type[NormMixin]], None]  # adds one class of layers to a registry


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
        layer: Any = modules.get(node.target) if node.op == "call_module" else None
        if not has_twin(layer) or len(node.args) != 1 or node.kwargs:  # a residual would be lost
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


def _tell_what_is_left(graph: Any, modules: dict[str, Any]) -> None:
    called: dict[Any, Any] = {n: modules.get(n.target) for n in graph.nodes if n.op == "call_module"}
    left: dict[str, Any] = {
        node.target: layer
        for node, layer in called.items()
        if has_twin(layer) and layer.activation is not None
        if len(node.args) == 1 and type(called.get(node.args[0])) in _FOLDED_INTO
    }
    timms = any(isinstance(layer, Applying) for layer in left.values())
    _LOG.warning(
        "torch.fx's optimizer does not fold %d layer%s (%s) into the %s, which would lose an activation. %s",
        len(left), "s" * (len(left) > 1), ", ".join(left),
        "ones before them" if len(left) > 1 else "one before it", way_out(timms),
    )  # fmt: skip


def fuser_methods(mappings: Any) -> Enter:
    """For fuse_modules and fuse_modules_qat, which look up the classes of the modules that they fuse."""
    table = mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
    theirs = dict(table)

    def enter(kind: type[NormMixin]) -> None:
        like = torchs_class(kind)
        if not is_ours(kind) or like is None:
            return
        for kinds, method in theirs.items():
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
    table = mappings.DEFAULT_STATIC_QUANT_MODULE_MAPPINGS

    def enter(kind: type[NormMixin]) -> None:
        if is_ours(kind) and torchs_class(kind) in table:
            make = functools.partial(_quantized, table[torchs_class(kind)])
            table.setdefault(kind, SimpleNamespace(from_float=make))

    return enter


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
        layer = modules.get(node.target) if node.op == "call_module" else None
        if layer is None or not has_twin(layer) or len(node.args) != 1 or node.kwargs:
            continue
        activation = layer.activation
        if isinstance(activation, nn.Module):  # timm's, which has hooks or other additions
            continue
        path, _, name = node.target.rpartition(".")
        parent = model.get_submodule(path)
        if getattr(parent, name) is layer:
            setattr(parent, name, twin(layer, "prepare_qat_fx", is_qat))
        if activation is None:
            continue
        behind = f"{node.target}_activation"
        model.add_submodule(behind, as_module(activation).train(layer.training))
        with model.graph.inserting_after(node):
            call = model.graph.call_module(behind, (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
    model.recompile()
    return model
