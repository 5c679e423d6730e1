"""bnfast.convert and bnfast.revert on layers, the same object with another class, which computes the same,
and layers that convert leaves alone. `tests/convert/test_models.py` has the layers of other libraries."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.testing import assert_close

import bnfast
from tests.support.convertible import ALL, BatchNormAct2d, attributes, data, network
from tests.support.training import assert_same_training, record

pytestmark = [
    pytest.mark.usefixtures("stand_ins"),
    pytest.mark.filterwarnings(*(f"ignore::{c}Warning" for c in ("Deprecation", "User", "Future"))),
]


@pytest.mark.parametrize("name", ALL)
def test_there_and_back(name: str, launches: list[Any]) -> None:
    """The same object with the same attributes all the way, and nothing changes the second time."""
    model, expected = network(name), record(network(name), data(name))
    layer, kind, before = model[1], type(model[1]), attributes(model[1])
    for call in (bnfast.convert, bnfast.revert):
        classes = []
        for _ in range(2):
            assert call(model) is model
            assert model[1] is layer
            assert attributes(layer) == before
            classes.append(type(layer))
        assert classes[0] is classes[1]
        if call is bnfast.convert:
            assert isinstance(layer, kind)
            assert isinstance(layer, getattr(bnfast, type(layer).__name__))
            assert type(layer).__module__.startswith("bnfast.modules.")
            assert not launches
            assert_same_training(record(copy.deepcopy(model), data(name)), expected)
            assert launches
    assert type(layer) is kind


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("name", ALL)
def test_checkpoints_copies_and_pickles(name: str) -> None:
    """Checkpoints load both ways; copies and pickles are converted too, and revert."""
    theirs, ours = network(name), bnfast.convert(network(name))
    for tensor in theirs.state_dict().values():
        tensor.add_(1)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    assert theirs.load_state_dict(ours.state_dict()) == ([], [])
    expected = record(copy.deepcopy(theirs), data(name))
    assert type(copy.copy(ours[1])) is type(ours[1])
    for copied in (copy.deepcopy(ours), *(pickle.loads(pickle.dumps(ours, p)) for p in (2, 5))):
        assert type(copied[1]) is type(ours[1])
        assert type(bnfast.revert(copied)[1]) is type(theirs[1])
        assert list(dict(copied.named_modules())) == list(dict(theirs.named_modules()))
        assert_same_training(record(copied, data(name)), expected)


def test_hooks_and_attributes_are_kept() -> None:
    layer: Any = nn.BatchNorm2d(4).requires_grad_(False).eval()
    layer.qconfig = "mine"  # an attribute that torch.ao.quantization sets
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, y: seen.append("after"))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    layer.register_state_dict_post_hook(lambda module, state, prefix, local: seen.append("saved"))
    layer.register_load_state_dict_pre_hook(lambda module, *rest: seen.append("loaded"))
    model = bnfast.convert(nn.Sequential(nn.Conv2d(2, 4, 1), layer))
    assert type(layer) is bnfast.BatchNorm2d
    assert layer.qconfig == "mine"
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    model(torch.randn(2, 2, 3, 3)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["before", "after", "backward", "saved", "loaded"]


@pytest.mark.parametrize("name", [name for name in ALL if "Frozen" in name])
def test_frozen_layers_keep_their_output_dtype(name: str) -> None:
    """Half-precision input and fp32 constants, as under autocast, give dtypes that depend on the library."""
    layer, x = network(name)[1].float(), torch.randn(2, 4, 3, 3, dtype=torch.float16)
    expected = layer(x)
    converted = bnfast.convert(layer)(x)
    assert expected.dtype == (torch.float16 if "detectron2" in name else torch.float32)
    assert_close(converted, expected, rtol=1e-3, atol=1e-3)
    assert bnfast.revert(layer)(x).dtype == expected.dtype


def test_models_that_are_graphs() -> None:
    expected = record(network("BatchNorm2d"), data())
    graph = bnfast.convert(torch.fx.symbolic_trace(network("BatchNorm2d")))
    assert type(graph.get_submodule("1")) is bnfast.BatchNorm2d
    assert_same_training(record(graph, data()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(network("BatchNorm2d"), fullgraph=True, backend="aot_eager")
    compiled(data())  # with torch.nn's layer: what was compiled is not used for ours
    compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in network("BatchNorm2d").state_dict().items()})
    bnfast.convert(compiled)
    renamed = {key.replace("_orig_mod.", ""): value for key, value in record(compiled, data()).items()}
    assert_same_training(renamed, expected)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("BatchNormAct") or "'s F" in name])
def test_scripted_as_the_librarys(name: str) -> None:
    model = bnfast.convert(network(name)).eval()
    assert_close(torch.jit.script(model)(data()), model(data()))


def test_a_transformer_layer() -> None:
    """torch's fast path reads LayerNorm's attributes beside its forward."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
    ours = bnfast.convert(copy.deepcopy(theirs))
    assert type(ours.norm1) is bnfast.LayerNorm
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert_same_training(record(ours, x), record(theirs, x))


@pytest.mark.parametrize("call", [bnfast.convert, bnfast.revert])
def test_takes_modules_only(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=rf"bnfast.{call.__name__} takes a torch.nn.Module, but got list"):
        call([nn.BatchNorm2d(4)])


# What convert leaves alone, and the reasons that it logs


class Same(nn.BatchNorm2d):
    """A subclass that adds nothing."""


class OfTheSameName(nn.BatchNorm2d):
    """As a library's class that was defined a second time, or somewhere else."""

    __module__, __qualname__ = "timm.layers.norm_act", "BatchNormAct2d"


class SomeNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def having(layer: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def timms(**attributes: Any) -> nn.Module:
    return having(BatchNormAct2d(4, nn.ReLU()), **attributes)


def with_hooked_part() -> nn.Module:
    layer: Any = timms()
    layer.act.register_forward_hook(lambda module, args, y: y + 1)
    return layer


# name: (layer, words of the reason)
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Same(4), r"Same \(a subclass of torch.nn.BatchNorm2d\)"),
    "same name": (lambda: OfTheSameName(4), "a subclass of torch.nn.BatchNorm2d"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "lazy: convert the model after its first batch"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.GroupNorm(2, 4)), "parametrized"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.BatchNorm2d(4)), "its parameters are computed"),
    "pruned": (
        lambda: nn.utils.prune.l1_unstructured(nn.BatchNorm2d(4), "weight", 1), "its parameters are computed"
    ),
    "scripted": (
        lambda: torch.jit.trace(nn.BatchNorm2d(4).eval(), torch.zeros(1, 4, 1, 1)), "compiled by torch.jit"
    ),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), "bnfast has no such layer"),
    "RMSNorm": (lambda: nn.RMSNorm(4), "bnfast has no such layer"),
    "somebody's": (lambda: SomeNorm(), "bnfast has no such layer"),
    "activation": (lambda: having(nn.BatchNorm2d(4), activation="relu"), "attributes of its own: activation"),
    "forward": (lambda: having(nn.BatchNorm2d(4), forward=abs), "attributes of its own: forward"),
    "unknown activation": (lambda: timms(act=nn.PReLU()), "its activation, PReLU, is not among"),
    "dropout": (lambda: timms(drop=nn.Dropout()), "its dropout, Dropout"),
    "hook on the activation": (with_hooked_part, "hooks on its activation"),
    "fast norm": (lambda: timms(_fast_norm=True), "timm's fast norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_and_listed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bnfast")
    make, words = LEFT[name]
    layer = make()
    model = nn.ModuleDict({"stem": nn.BatchNorm2d(4), "other": layer, "again": layer})
    kind, before = type(layer), attributes(layer)
    bnfast.convert(model)
    assert type(model["stem"]) is bnfast.BatchNorm2d
    assert type(layer) is kind
    assert attributes(layer) == before
    total, left = caplog.messages
    assert total.startswith("convert: 1 layers; 1 torch.nn.modules.batchnorm.BatchNorm2d -> bnfast.modules.")
    assert total.endswith("; 1 left alone")
    assert left.startswith("convert: left alone: 1 ")
    assert left.endswith(": other")
    bnfast.convert(layer)
    assert re.search(f"{words}.*: the model$", caplog.messages[3])


def test_lazy_layers_convert_once_they_are_made() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 3, 4, 4))
    assert type(bnfast.convert(model)[0]) is bnfast.BatchNorm2d


def test_containers_called_norm_are_no_layers(caplog: pytest.LogCaptureFixture) -> None:
    class ConvNormAct(nn.Sequential):
        pass

    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.convert(ConvNormAct(model, nn.BatchNorm1d(3), bnfast.BatchNorm1d(3)))
    assert [message[-14:] for message in caplog.messages] == ["; 0 left alone"]


def test_subclasses_of_ours_are_left_by_both(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(bnfast.BatchNorm2d):
        pass

    layer = Mine(4)
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.revert(bnfast.convert(layer))
    assert type(layer) is Mine
    assert "Mine (a subclass of bnfast's): the model" in caplog.messages[-1]
