"""bnfast.convert and bnfast.revert on layers: the same object with another class, which computes the same. In
plain torch; `tests/convert/test_models.py` has the kernels too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnfast
from bnfast import dispatch
from tests.support.convertible import ALL, data, network
from tests.support.foreign import BatchNormAct2d, put_in_place
from tests.support.training import assert_same_training, record

PARTS = ("act", "drop")


@pytest.fixture(autouse=True)
def _others_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    monkeypatch.setattr(dispatch, "INTERPRET", False)


def held(module: nn.Module) -> dict[str, Any]:
    """What a layer holds, the same objects included; timm's two modules apart."""
    mine = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    mine |= {name: [*getattr(module, name)] for name in vars(module) if name.endswith("_hooks")}
    for part in ("_parameters", "_buffers", "_modules"):
        mine |= {f"{part} {name}": id(t) for name, t in getattr(module, part).items() if name not in PARTS}
    return mine


@pytest.mark.parametrize("name", ALL)
def test_same_training(name: str) -> None:
    theirs = network(name)
    ours = bnfast.convert(copy.deepcopy(theirs))
    assert type(ours[1]).__module__.startswith("bnfast.modules.")
    assert_same_training(record(ours, data(name)), record(theirs, data(name)))


@pytest.mark.parametrize("name", ALL)
def test_there_and_back(name: str) -> None:
    """Same objects all the way, and in the end nothing that was not there before."""
    model = network(name).eval()
    layer, kind, before, keys = model[1], type(model[1]), held(model[1]), list(model.state_dict())
    parts = list(layer.named_children())
    assert bnfast.convert(model) is model
    assert model[1] is layer
    assert isinstance(layer, getattr(bnfast, type(layer).__name__))
    converted = held(layer)
    for ours in ("activation", "keep_dtype"):
        converted.pop(ours, None)
    assert converted == before
    assert list(model.state_dict()) == keys
    assert bnfast.revert(model) is model
    assert type(layer) is kind
    assert held(layer) == before
    assert list(layer.named_children()) == parts


@pytest.mark.parametrize("name", ALL)
def test_a_second_time_changes_nothing(name: str) -> None:
    model = bnfast.convert(network(name))
    kind, before = type(model[1]), held(model[1])
    assert type(bnfast.convert(model)[1]) is kind
    assert held(model[1]) == before
    plainly = bnfast.revert(model)
    kind, before = type(model[1]), held(model[1])
    assert type(bnfast.revert(plainly)[1]) is kind
    assert held(model[1]) == before


@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNormAct2d", "torchvision's FrozenBatchNorm2d"])
def test_copies_and_pickles_revert_too(name: str) -> None:
    model = network(name)
    expected = record(copy.deepcopy(model), data(name))
    bnfast.convert(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(bnfast.revert(copied)[1]) is type(network(name)[1])
        assert_same_training(record(copied, data(name)), expected)


def test_a_model_that_is_a_layer() -> None:
    layer = nn.BatchNorm2d(4)
    assert bnfast.convert(layer) is layer
    assert type(layer) is bnfast.BatchNorm2d
    assert type(bnfast.revert(layer)) is nn.BatchNorm2d


def test_shared_and_tied_layers_stay_so() -> None:
    shared, tied = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    tied.weight = shared.weight
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared, tied)})
    beside = [shared]  # as models keep lists of their layers
    bnfast.convert(model)
    assert model["first"] is model["second"][0] is beside[0]
    assert type(beside[0]) is bnfast.BatchNorm2d
    assert model["second"][1].weight is shared.weight
    assert len(list(model.parameters())) == 3


def test_the_optimizer_goes_on() -> None:
    """Converted in the middle of a training, which goes on as it would have."""
    ends = []
    for converted in (False, True):
        model = network("BatchNormAct2d")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(4):
            if converted and step == 1:
                bnfast.convert(model)
            if converted and step == 2:
                bnfast.fuse(model)
            if converted and step == 3:
                bnfast.revert(model)
            optimizer.zero_grad()
            model(data("BatchNormAct2d")).square().sum().backward()
            optimizer.step()
        moments = {f"moment {i}": s["exp_avg"] for i, s in optimizer.state_dict()["state"].items()}
        ends.append(model.state_dict() | moments)
    assert_same_training(*ends)


def test_hooks_and_attributes_are_kept() -> None:
    layer = nn.BatchNorm2d(4).requires_grad_(False).eval()
    layer.mark = "mine"  # type: ignore[assignment]
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, y: seen.append("after"))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    layer.register_state_dict_post_hook(lambda module, state, prefix, local: seen.append("saved"))
    layer.register_load_state_dict_pre_hook(lambda module, *rest: seen.append("loaded"))
    model = bnfast.convert(nn.Sequential(nn.Conv2d(2, 4, 1), layer))
    assert layer.mark == "mine"
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    model(torch.randn(2, 2, 3, 3)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["before", "after", "backward", "saved", "loaded"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_flags_and_checkpoints_stay(dtype: torch.dtype) -> None:
    """Some layers in eval, some parameters frozen."""
    names = [name for name in ALL if ALL[name][0] == 2]
    theirs = nn.Sequential(*(network(name)[1] for name in names)).to(dtype)
    for layer in theirs[::2]:
        layer.eval()
    for parameter in list(theirs.parameters())[::3]:
        parameter.requires_grad_(False)
    ours = bnfast.convert(copy.deepcopy(theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.training is b.training
        assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
    expected = theirs.state_dict()
    assert {k: (t.dtype, t.shape) for k, t in ours.state_dict().items()} == {
        k: (t.dtype, t.shape) for k, t in expected.items()
    }
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for tensor in (*source.parameters(), *source.buffers()):
                tensor.add_(1)
        assert target.load_state_dict(source.state_dict(), strict=True) == ([], [])
        assert_close(dict(target.state_dict()), dict(source.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_half_precision_models(name: str, dtype: torch.dtype) -> None:
    """Outputs of the same dtype, near the model's in fp64; torch's own GroupNorm and such are no nearer."""
    theirs = network(name)
    wide, x = theirs(data(name).to(dtype).double()), data(name).to(dtype)
    theirs = network(name).to(dtype)
    y = theirs(x)
    ours = bnfast.convert(network(name).to(dtype))(x)
    assert ours.dtype == y.dtype
    assert_close(ours.double(), wide, rtol=0.1, atol=0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("name", [name for name in ALL if "Frozen" in name])
def test_frozen_layers_keep_their_output_dtype(name: str) -> None:
    """Of half-precision input with fp32 constants, as under autocast: libraries differ."""
    layer, x = network(name)[1].float(), torch.randn(2, 4, 3, 3, dtype=torch.float16)
    expected = layer(x)
    converted = bnfast.convert(layer)(x)
    assert expected.dtype == (torch.float16 if "detectron2" in name else torch.float32)
    assert_close(converted, expected, rtol=1e-3, atol=1e-3)
    assert bnfast.revert(layer)(x).dtype == expected.dtype


def test_modes_set_in_between_reach_what_was_put_away() -> None:
    model = bnfast.convert(nn.Sequential(BatchNormAct2d(4, nn.ReLU()))).eval()
    assert not any(module.training for module in bnfast.revert(model).modules())
    bnfast.convert(model).train()
    assert all(module.training for module in bnfast.revert(model).modules())


def test_on_meta() -> None:
    with torch.device("meta"):
        model = bnfast.convert(nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)))
    assert [type(m) for m in model] == [bnfast.BatchNorm2d, bnfast.LayerNorm, bnfast.GroupNorm]
    assert all(t.is_meta for t in model.state_dict().values())
    assert model(torch.empty(2, 4, 3, 4, device="meta")).shape == (2, 4, 3, 4)


def test_quantizations_mark_stays() -> None:
    layer = nn.BatchNorm2d(4)
    layer.qconfig = "set"
    assert bnfast.convert(layer).qconfig == "set"
    assert type(layer) is bnfast.BatchNorm2d
    assert bnfast.revert(layer).qconfig == "set"
    assert type(layer) is nn.BatchNorm2d
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


def test_models_that_are_graphs() -> None:
    x, expected = data("BatchNorm2d"), record(network("BatchNorm2d"), data("BatchNorm2d"))
    graph = bnfast.convert(torch.fx.symbolic_trace(network("BatchNorm2d")))
    assert type(graph.get_submodule("1")) is bnfast.BatchNorm2d
    assert_same_training(record(graph, x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(network("BatchNorm2d"), fullgraph=True, backend="aot_eager")
    compiled(x)  # with torch.nn's layer: what was compiled is not used for ours
    compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in network("BatchNorm2d").state_dict().items()})
    bnfast.convert(compiled)
    renamed = {key.replace("_orig_mod.", ""): value for key, value in record(compiled, x).items()}
    assert_same_training(renamed, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in ALL if "FrozenBatchNorm2d" in name or "Identity" in name])
def test_scripted_as_plain_torch(name: str) -> None:
    """Whatever it was converted from."""
    model = bnfast.convert(network(name)).eval()
    assert_close(torch.jit.script(model)(data(name)), model(data(name)))


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
