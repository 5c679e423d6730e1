"""Every layer is a module as its twin is: checkpoints, copies, devices, calls with another state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.support.layers import Layer, assert_same, every_layer, every_path, step, tracking

pytestmark = pytest.mark.compiled


@every_path
@pytest.mark.parametrize("from_ours", [True, False], ids=["ours to theirs", "theirs to ours"])
@every_layer
def test_checkpoints_load_both_ways(layer: Layer, from_ours: bool, path: str) -> None:
    pair = layer.pair(**(layer.tracks or {}))
    source, target = pair if from_ours else reversed(pair)
    step(source, layer.input())
    for t in target.state_dict().values():
        t.zero_()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert target.load_state_dict(torch.load(file), strict=True) == ([], [])
    assert_same(step(target.eval(), layer.input()), step(source.eval(), layer.input()))


@every_path
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@every_layer
def test_copies_are_independent(layer: Layer, clone: Callable[[nn.Module], nn.Module], path: str) -> None:
    ours = layer.make(**(layer.tracks or {}), eps=1e-3)
    step(ours, layer.input())
    before = copy.deepcopy(ours.state_dict())
    twin = clone(ours)
    assert type(twin) is type(ours)
    after = step(twin, layer.input())
    for t in twin.state_dict().values():
        t.zero_()
    assert_same(ours.state_dict(), before, rtol=0, atol=0)
    assert_same(step(ours, layer.input()), after, rtol=0, atol=0)


@every_layer
def test_meta_device_then_to_empty(layer: Layer) -> None:
    ours = layer.ours(*layer.arguments, device="meta", dtype=torch.float64)
    x = layer.input(dtype=torch.float64, last=layer.keeps_format)
    y = ours(x.to("meta"))
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    with torch.device("meta"):
        assert all(t.is_meta for t in layer.ours(*layer.arguments).state_dict().values())
    ours = ours.to_empty(device="cpu")
    fresh = layer.theirs(*layer.arguments, dtype=torch.float64)
    ours.load_state_dict(fresh.state_dict())
    if hasattr(ours, "reset_parameters"):
        for t in ours.state_dict().values():
            t.fill_(7)
        ours.reset_parameters()
    assert_same(step(ours, x), step(fresh, x))


@every_path
@tracking
def test_functional_call_updates_only_what_it_is_given(layer: Layer, path: str) -> None:
    results = []
    for module in layer.pair(**(layer.tracks or {})):
        before = copy.deepcopy(module.state_dict())
        state = {k: v.detach() + 1 for k, v in before.items()}
        y = torch.func.functional_call(module, state, (layer.input(),))
        results.append({"y": y.detach(), **state})
        assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert_same(*results)


@every_path
@every_layer
def test_stacked_models(layer: Layer, path: str) -> None:
    """Ensembling: two evaluated models as one, by vmap over their states."""
    models = [layer.make(**(layer.tracks or {})).eval() for _ in range(2)]
    for t in models[1].state_dict().values():
        t.add_(1)
    x = layer.input()
    state = torch.func.stack_module_state(models)
    y = torch.func.vmap(lambda s: torch.func.functional_call(models[0], s, (x,)))(state)
    assert_close(y, torch.stack([m(x) for m in models]))
