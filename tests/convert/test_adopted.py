"""Layers that bnfast.convert has taken from another library are still that library's for its own tools, and
notice what those change in the modules that the layers call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import bnfast
from bnfast.adopted import as_module
from bnfast.kernels.epilogue import of_module
from tests.support.convertible import BatchNormAct2d, around, data, network
from tests.support.fused import Block
from tests.support.training import assert_same_training, record

pytestmark = pytest.mark.usefixtures("stand_ins", "plain_torch")


def exchange(part: str, new: Callable[[], nn.Module]) -> Callable[[Any], object]:
    return lambda module: setattr(module, part, new())


def add_one(module: nn.Module) -> object:
    return module.register_forward_hook(lambda module, args, y: y + 1)


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda module: None,
    "another activation": exchange("act", nn.SiLU),
    "none": exchange("act", nn.Identity),
    "one that bnfast does not have": exchange("act", nn.Softplus),
    "a dropout": exchange("drop", lambda: nn.Dropout(0.5)),
    "a hook on the activation": lambda module: add_one(module.act),
    "a hook on the dropout": lambda module: add_one(module.drop),
    "a hook on none": lambda module: (exchange("act", nn.Identity)(module), add_one(module.act)),
}


def timms_block() -> Block:
    """timm's form of a residual block: the layer has no activation, for the one that follows the add."""
    return Block(lambda self, y, x: F.silu(y + x), norm=BatchNormAct2d(4, nn.Identity()))


BLOCK = "the layer of a fused block"
APPLYING = ("BatchNormAct2d", "BatchNormAct2d, Identity", "FrozenBatchNormAct2d", "LayerNormAct")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*APPLYING, BLOCK])
def test_what_is_changed_later_is_heeded(name: str, change: str) -> None:
    """timm's modules are called wherever what the kernels apply would not be the same."""
    theirs, x = (around(timms_block()), data()) if name == BLOCK else (network(name), data(name))
    ours = bnfast.fuse(copy.deepcopy(theirs))
    if name == BLOCK:
        assert [site.block for site in bnfast.fusion_report(ours).fused] == ["1"]
    for model in (theirs, ours):
        CHANGES[change](model[1].norm if name == BLOCK else model[1])
    assert_same_training(record(ours, x, steps=1), record(theirs, x, steps=1))


def test_hooks_on_all_modules_see_the_activation() -> None:
    layer, seen = bnfast.convert(BatchNormAct2d(4, nn.ReLU())), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(type(module)))
    try:
        layer(torch.randn(2, 4, 3, 3))
    finally:
        handle.remove()
    assert seen == [nn.Identity, nn.ReLU, type(layer)]


def test_a_residual_goes_before_the_activation() -> None:
    layer = bnfast.convert(BatchNormAct2d(4, nn.ReLU())).double()
    bare = nn.BatchNorm2d(4).double()
    x, z = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    assert_close(layer(x, residual=z), (bare(x) + z).relu())
    layer.act = nn.Softplus()
    assert_close(layer(x, z), F.softplus(bare(x) + z))


def test_compiled_whole() -> None:
    model = bnfast.convert(network("BatchNormAct2d")).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for kind in (nn.ReLU, nn.SiLU, nn.Softplus):
        model[1].act = kind()
        assert_close(compiled(data()), model(data()))


@pytest.mark.parametrize("name", bnfast.activation.NAMES)
def test_each_activation_as_a_module(name: str) -> None:
    default = bnfast.Activation.of(name)
    for activation in (default, default._replace(parameter=2 * default.parameter)):
        assert of_module(as_module(activation)) == activation


def test_a_subclass_of_one_is_copied_as_itself() -> None:
    layer = bnfast.convert(BatchNormAct2d(4, nn.ReLU()))
    layer.__class__ = mine = type("Mine", (type(layer),), {})
    assert type(copy.deepcopy(layer)) is mine
    assert type(bnfast.revert(layer)) is mine
