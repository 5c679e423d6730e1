"""A model stays right through all that happens to models once bnfast.fuse is through with them."""

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

import bnfast
from tests.support.block_forms import CHANNELS, Residual, conv_norm_act, network
from tests.support.fused import data, fused_count
from tests.support.training import assert_same_training, record


# What may happen to a model once it is fused, and how many of the network's 5 sites are left then.
def _hook_norm(m: Any) -> None:
    m[1].bn1.register_forward_hook(lambda module, args, y: y * 2)


def _hook_activation(m: Any) -> None:
    m[0][2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _hook_gradients(m: Any) -> None:
    m[0][1].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,))


def _hook_gradients_before(m: Any) -> None:
    m[0][1].register_full_backward_pre_hook(lambda module, dy: (dy[0] * 2,))


def _replace_norm(m: Any) -> None:
    m[1].bn1 = nn.InstanceNorm2d(CHANNELS)


def _replace_norm_in_sequence(m: Any) -> None:
    m[0][1] = nn.InstanceNorm2d(CHANNELS)


def _replace_activation(m: Any) -> None:
    m[0][2] = nn.Tanh()


def _append(m: Any) -> None:
    m[0].append(nn.Tanh())


def _insert(m: Any) -> None:
    m[0].insert(2, nn.Tanh())


def _flag(m: Any) -> None:
    m[1].doubled = True


def _drop_shortcut(m: Any) -> None:
    m[2].downsample = None


def _replace_forward(m: Any) -> None:
    m[1].forward = lambda x: x * 3


CHANGES: dict[str, tuple[Callable[[Any], None], int]] = {
    "hook on a layer": (_hook_norm, 4),
    "hook on an activation": (_hook_activation, 4),
    "backward hook": (_hook_gradients, 4),
    "backward pre-hook": (_hook_gradients_before, 4),
    "layer replaced": (_replace_norm, 3),
    "layer replaced in a Sequential": (_replace_norm_in_sequence, 4),
    "activation replaced": (_replace_activation, 4),
    "module appended": (_append, 4),
    "module inserted": (_insert, 4),
    "plain attribute": (_flag, 3),
    "child removed": (_drop_shortcut, 3),
    "forward replaced": (_replace_forward, 3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_fusing(name: str) -> None:
    change, left = CHANGES[name]
    ours, theirs = bnfast.fuse(network()), network()
    assert fused_count(ours) == 5
    change(ours), change(theirs)
    assert fused_count(ours) == left
    assert_same_training(record(ours, data()), record(theirs, data()))


def test_hooks_switch_a_site_back_and_forth(calls: list[tuple[str | None, bool]]) -> None:
    model = bnfast.fuse(conv_norm_act()).double()
    handle = model[1].register_forward_hook(lambda module, args, y: None)
    model(data())
    handle.remove()
    model(data())
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    model(data())
    everywhere.remove()
    assert calls == [(None, False), ("relu", False), (None, False)]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules(kind: str) -> None:
    model = bnfast.fuse(conv_norm_act())
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *args: None)
    try:
        assert fused_count(model) == 0
    finally:
        handle.remove()
    assert fused_count(model) == 1


def test_the_forward_of_the_class_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bnfast.fuse(Residual()).double()
    monkeypatch.setattr(Residual, "forward", lambda self, x: x * 3)
    assert torch.equal(model(data()), data() * 3)
    assert fused_count(model) == 0


def test_convert_sync_batchnorm() -> None:
    """Layers replaced: nothing is fused, and the result is that of the layers that came."""
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(bnfast.fuse(network())).eval()
    assert {type(ours[0][1]), type(ours[1].bn1)} == {nn.SyncBatchNorm}
    report = bnfast.fusion_report(ours)
    assert (report.fused, len(report.skipped)) == ((), 6)
    torch.testing.assert_close(ours(data()), network().eval()(data()))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
    "replica": lambda model: _replica(model),
}


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


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("changed", [False, True], ids=["as fused", "changed since"])
def test_copies(name: str, changed: bool) -> None:
    ours, theirs = bnfast.fuse(network()), network()
    if changed:
        _flag(ours), _flag(theirs)
    copied = COPIES[name](ours)
    assert isinstance(copied[1], Residual)
    torch.testing.assert_close(copied(data()), theirs(data()))
    if not changed:
        assert fused_count(copied) == 5
        _flag(copied), _flag(theirs)
        torch.testing.assert_close(copied(data()), theirs(data()))


def test_passes_for_what_it_was() -> None:
    ours, theirs = bnfast.fuse(network()), network()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert isinstance(ours[1], Residual)
    assert repr(ours) == repr(bnfast.convert(theirs))
    assert inspect.signature(ours[1].forward) == inspect.signature(theirs[1].forward)
    ours.load_state_dict(theirs.state_dict())


def test_blocks_alike_share_a_class() -> None:
    model = bnfast.fuse(nn.Sequential(Residual(), Residual(), Residual(shortcut=True)))
    assert type(model[0]) is type(model[1]) is not type(model[2])


def test_fusing_again_changes_nothing() -> None:
    model = bnfast.fuse(bnfast.fuse(network()))
    assert fused_count(model) == 5
    assert type(model[1]).__mro__.count(Residual) == 1


def test_unfuse_and_revert() -> None:
    ours, theirs = bnfast.fuse(network()), network()
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


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(training: bool) -> None:
    ours, theirs = bnfast.fuse(network()).train(training), network().train(training)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data()), theirs(data()))
    _flag(ours), _flag(theirs)
    torch.testing.assert_close(compiled(data()), theirs(data()))


def test_recorded_by_fx_as_the_original() -> None:
    ours, theirs = bnfast.fuse(network()).eval(), network().eval()
    graph = torch.fx.symbolic_trace(ours)
    assert sum(isinstance(m, nn.ReLU) for m in graph.modules()) == 3
    torch.testing.assert_close(graph(data()), theirs(data()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "how", [torch.jit.script, lambda m: torch.jit.trace(m, data())], ids=["script", "trace"]
)
def test_jit(how: Callable[[nn.Module], nn.Module]) -> None:
    ours, theirs = bnfast.fuse(network()).eval(), network().eval()
    torch.testing.assert_close(how(ours)(data()), theirs(data()))


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel
        ours, theirs = (record(parallel(m), data()) for m in (bnfast.fuse(network()), network()))
    finally:
        torch.distributed.destroy_process_group()
    assert_same_training(ours, theirs)
