"""A model stays right through all that happens to models once they are fused, also where its class, or a
child's, is out of the ordinary."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import bnfast
from tests.support.fused import Block, Residual, conv_norm_act, data, fused_count, network, pair
from tests.support.training import assert_same_training, record

SCRIPT, TRACE = torch.jit.script, lambda module: torch.jit.trace(module, data())


def _nothing(*args: Any) -> None:
    pass


def by_jit(test: Any) -> Any:
    test = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")(test)
    return pytest.mark.parametrize("how", [SCRIPT, TRACE], ids=["script", "trace"])(test)


EVERYWHERE = ("module_forward", "module_forward_pre", "module_full_backward", "module_full_backward_pre")


@pytest.mark.parametrize("kind", ["forward", *EVERYWHERE])
def test_hooks_switch_a_site_back_and_forth(kind: str, calls: list[tuple[str | None, bool]]) -> None:
    model = bnfast.fuse(conv_norm_act()).double()
    handle = getattr(nn.modules.module if kind in EVERYWHERE else model[1], f"register_{kind}_hook")(_nothing)
    try:
        model(data())
        assert fused_count(model) == 0
    finally:
        handle.remove()
    model(data())
    assert fused_count(model) == 1
    assert calls == [(None, False), ("relu", False)]


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _replica(model: Any) -> nn.Module:
    """As DataParallel makes one, but for the parameters, which stay where they are."""
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        replica._modules[name] = _replica(child)
    for name, parameter in model._parameters.items():
        replica._parameters.pop(name, None)
        setattr(replica, name, None if parameter is None else parameter.detach().clone())
    return replica


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, _pickled, _saved, _replica])
@pytest.mark.parametrize("changed", [False, True], ids=["as fused", "changed since"])
def test_copies(how: Callable[[nn.Module], Any], changed: bool) -> None:
    ours, theirs = pair(network)
    if changed:
        ours[1].doubled = theirs[1].doubled = True
    copied = how(ours)
    assert isinstance(copied[1], Residual)
    torch.testing.assert_close(copied(data()), theirs(data()))
    if not changed:
        assert fused_count(copied) == 5
        copied[1].doubled = theirs[1].doubled = True
        torch.testing.assert_close(copied(data()), theirs(data()))


def test_passes_for_what_it_was() -> None:
    ours, theirs = pair(network)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert repr(ours) == repr(bnfast.convert(theirs))
    assert inspect.signature(ours[1].forward) == inspect.signature(theirs[1].forward)
    ours.load_state_dict(theirs.state_dict())


def test_fusing_again_changes_nothing() -> None:
    model = bnfast.fuse(bnfast.fuse(network()))
    assert fused_count(model) == 5
    assert type(model[1]).__mro__.count(Residual) == 1


def test_unfuse_and_revert() -> None:
    ours, theirs = pair(network)
    assert bnfast.unfuse(ours) is ours
    assert [type(m) for m in ours.modules()] == [type(m) for m in bnfast.convert(network()).modules()]
    assert fused_count(ours) == 0
    assert {s.reason for s in bnfast.fusion_report(ours).skipped} >= {"not fused: bnfast.fuse does it"}
    reverted = bnfast.revert(bnfast.fuse(ours))
    assert [type(m) for m in reverted.modules()] == [type(m) for m in theirs.modules()]


def test_unfuse_says_what_it_cannot_undo() -> None:
    model = bnfast.fuse(network())
    model[1].__class__ = type("Wrapped", (type(model[1]),), {})
    with pytest.warns(UserWarning, match="1 stays fused: its class has become .*Wrapped"):
        bnfast.unfuse(model)
    assert type(model[0]) is nn.Sequential


def test_recorded_by_fx_as_the_original() -> None:
    ours, theirs = (model.eval() for model in pair(network))
    graph = torch.fx.symbolic_trace(ours)
    assert sum(isinstance(m, nn.ReLU) for m in graph.modules()) == 3
    torch.testing.assert_close(graph(data()), theirs(data()))


@by_jit
def test_jit(how: Callable[[nn.Module], nn.Module]) -> None:
    ours, theirs = (model.eval() for model in pair(network))
    torch.testing.assert_close(how(ours)(data()), theirs(data()))


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        ours, theirs = (record(nn.parallel.DistributedDataParallel(m), data()) for m in pair(network))
    finally:
        torch.distributed.destroy_process_group()
    assert_same_training(ours, theirs)


class Registered:
    """Subclasses of it are known by name, and have to be new."""

    known: dict[str, type] = {}

    def __init_subclass__(cls) -> None:
        if cls.__name__ in Registered.known:
            raise ValueError(f"{cls.__name__} is known")
        Registered.known[cls.__name__] = cls


class InRegister(Block, Registered):
    pass


class _Meta(type):
    made: list[str] = []

    def __init__(cls, name: str, *rest: Any) -> None:
        super().__init__(name, *rest)
        _Meta.made.append(name)


class OfMeta(Block, metaclass=_Meta):
    pass


class Closed(Block):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("closed")
        super().__setattr__(name, value)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("make", [InRegister, OfMeta, Closed])
def test_classes_that_watch_over_themselves(make: type[Block]) -> None:
    known, made = dict(Registered.known), list(_Meta.made)
    ours, theirs = pair(make)
    assert fused_count(ours) == 1
    assert fused_count(pickle.loads(pickle.dumps(ours))) == 1
    assert (Registered.known, _Meta.made) == (known, made)
    assert_same_training(record(ours, data()), record(theirs, data()))
    assert type(bnfast.unfuse(ours)) is make


@by_jit
def test_beside_compiled_children(how: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    theirs = conv_norm_act().double()
    expected = record(copy.deepcopy(theirs), data())
    theirs[0] = how(theirs[0])
    ours = bnfast.fuse(theirs)
    assert fused_count(ours) == 1
    assert_same_training(record(ours, data()), expected)


def test_copies_of_what_holds_itself() -> None:
    model = conv_norm_act()
    model.everything = [model]  # type: ignore[assignment]
    copied = copy.deepcopy(bnfast.fuse(model))
    assert copied.everything[0] is copied
    assert copied is not model


def test_compiled_in_place_and_copied() -> None:
    """torch's modules leave what was compiled behind, for it calls the first."""
    model = bnfast.fuse(conv_norm_act()).double().eval()
    model.compile(backend="eager")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nn.init.zeros_(copied[0].weight)
        assert torch.equal(copied(data()), torch.zeros_like(data()))


def test_parametrized_since_and_pickled() -> None:
    model = bnfast.fuse(Block(offset=nn.Parameter(torch.ones(1))))
    parametrize.register_parametrization(model, "offset", nn.Identity())
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(model)
