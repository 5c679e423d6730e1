"""bnfast.convert and bnfast.revert on layers: the same object with another class, which computes the same. In
plain torch; `tests/convert/test_models.py` has the kernels too."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnfast
from tests.support.convertible import ALL, attributes, data, network
from tests.support.training import assert_same_training, record

pytestmark = pytest.mark.usefixtures("stand_ins", "plain_torch")
every_layer = pytest.mark.parametrize("name", ALL)


@every_layer
def test_there_and_back(name: str) -> None:
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
            assert_same_training(record(copy.deepcopy(model), data(name)), expected)
    assert type(layer) is kind


@every_layer
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_layer
def test_half_precision_models(name: str, dtype: torch.dtype) -> None:
    """Outputs of the same dtype, near the model's in fp64; torch's own GroupNorm and such are no nearer."""
    x = data(name).to(dtype)
    expected, y = network(name)(x.double()), network(name).to(dtype)(x)
    ours = bnfast.convert(network(name).to(dtype))(x)
    assert ours.dtype == y.dtype
    assert_close(ours.double(), expected, rtol=0.1, atol=0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("name", [name for name in ALL if "Frozen" in name])
def test_frozen_layers_keep_their_output_dtype(name: str) -> None:
    """Half-precision input and fp32 constants, as under autocast, give dtypes that depend on the library."""
    layer, x = network(name)[1].float(), torch.randn(2, 4, 3, 3, dtype=torch.float16)
    expected = layer(x)
    converted = bnfast.convert(layer)(x)
    assert expected.dtype == (torch.float16 if "detectron2" in name else torch.float32)
    assert_close(converted, expected, rtol=1e-3, atol=1e-3)
    assert bnfast.revert(layer)(x).dtype == expected.dtype


def test_on_meta() -> None:
    with torch.device("meta"):
        model = bnfast.convert(nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)))
    assert [type(m) for m in model] == [bnfast.BatchNorm2d, bnfast.LayerNorm, bnfast.GroupNorm]
    assert all(t.is_meta for t in model.state_dict().values())
    assert model(torch.empty(2, 4, 3, 4, device="meta")).shape == (2, 4, 3, 4)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
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
