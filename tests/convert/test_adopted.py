"""Layers that bnfast.convert has taken from another library are still that library's for its own tools, and
heed what those do to the modules that they call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from bnfast.adopted import as_module
from bnfast.fusing.activations import of_module
from tests.support import foreign
from tests.support.convertible import OTHERS, data, network
from tests.support.foreign import BatchNormAct2d, put_in_place
from tests.support.training import assert_same_training, record


@pytest.fixture(autouse=True)
def _others_are_found(monkeypatch: pytest.MonkeyPatch, plain_torch: None) -> None:
    put_in_place(monkeypatch)


@pytest.mark.parametrize("name", OTHERS)
def test_is_of_both_classes(name: str) -> None:
    theirs = network(name)[1]
    kind, children = type(theirs), dict(theirs.named_children())
    ours = bnfast.convert(theirs)
    for layer in (
        ours,
        copy.deepcopy(ours),
        copy.copy(ours),
        *(pickle.loads(pickle.dumps(ours, p)) for p in (2, 5)),
    ):
        assert isinstance(layer, kind)
        assert isinstance(layer, getattr(bnfast, type(layer).__name__))
        assert type(layer) is type(ours)
        assert [*dict(layer.named_children())] == [*children]
    assert dict(ours.named_children()) == children
    assert type(bnfast.convert(kind(*((4,) if not children else (4, nn.ReLU()))))) is type(ours)


def hook(module: Any) -> None:
    module.act.register_forward_hook(lambda act, args, y: y + 1)


def hook_in_front_of_dropout(module: Any) -> None:
    module.drop.register_forward_pre_hook(lambda drop, args: (args[0] + 1,))


def exchange(part: str, new: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, part, new())


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "another activation": exchange("act", nn.SiLU),
    "none": exchange("act", nn.Identity),
    "one that bnfast has not": exchange("act", nn.Softplus),
    "a dropout": exchange("drop", lambda: nn.Dropout(0.5)),
    "a hook on the activation": hook,
    "a hook on the dropout": hook_in_front_of_dropout,
    "a hook on none": lambda module: (exchange("act", nn.Identity)(module), hook(module))[0],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["BatchNormAct2d", "BatchNormAct2d, Identity", "FrozenBatchNormAct2d", "LayerNormAct"]
)
def test_what_is_changed_later_is_heeded(name: str, change: str) -> None:
    """timm's modules are called wherever what the kernels apply would not be the same."""
    theirs = network(name)
    ours = bnfast.fuse(copy.deepcopy(theirs))
    for model in (theirs, ours):
        CHANGES[change](model[1])
    assert_same_training(record(ours, data(name), steps=1), record(theirs, data(name), steps=1))


class Residual(nn.Module):
    """timm's form, whose second layer has no activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2, self.act = (
            BatchNormAct2d(4, nn.ReLU()),
            BatchNormAct2d(4, nn.Identity()),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.bn1(x)) + x)


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_in_a_fused_block(change: str | None) -> None:
    theirs = nn.Sequential(nn.Conv2d(3, 4, 1), Residual()).double()
    ours = bnfast.fuse(copy.deepcopy(theirs))
    assert [site.norm for site in bnfast.fusion_report(ours).fused if site.block is not None] == ["1.bn2"]
    if change is not None:
        for model in (theirs, ours):
            CHANGES[change](model[1].bn2)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
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
    assert_close(layer(x, z), nn.functional.softplus(bare(x) + z))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_as_the_librarys() -> None:
    model = bnfast.convert(network("BatchNormAct2d")).eval()
    assert_close(torch.jit.script(model)(data("BatchNormAct2d")), model(data("BatchNormAct2d")))


def test_compiled_whole() -> None:
    model = bnfast.convert(network("BatchNormAct2d")).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for kind in (nn.ReLU, nn.SiLU, nn.Softplus):
        model[1].act = kind()
        assert_close(compiled(data("BatchNormAct2d")), model(data("BatchNormAct2d")))


def test_other_converters_than_timms_are_stopped() -> None:
    """They would leave out what timm's keep."""
    model = bnfast.convert(nn.Sequential(BatchNormAct2d(4, nn.ReLU())))
    for convert in (
        nn.SyncBatchNorm.convert_sync_batchnorm,
        foreign.DetectronFrozen.convert_frozen_batchnorm,
    ):
        with pytest.raises(
            RuntimeError,
            match=rf"applies ReLU itself.*{convert.__name__} .*use timm's convert_sync_batchnorm or",
        ):
            convert(model)
    model[0].act = nn.Identity()
    assert type(foreign.DetectronFrozen.convert_frozen_batchnorm(model)[0]) is foreign.DetectronFrozen


@pytest.mark.parametrize("name", bnfast.activation.NAMES)
def test_each_activation_as_a_module(name: str) -> None:
    for activation in {
        bnfast.Activation.of(name),
        bnfast.Activation(name, bnfast.activation.PARAMETERS.get(name, 0.0) * 2),
    }:
        assert of_module(as_module(activation)) == activation


def test_a_subclass_of_one_is_pickled_as_itself() -> None:
    layer = bnfast.convert(BatchNormAct2d(4, nn.ReLU()))
    mine = type("Mine", (type(layer),), {})
    layer.__class__ = mine
    assert type(copy.deepcopy(layer)) is mine
    assert bnfast.revert(layer) is layer
    assert type(layer) is mine
