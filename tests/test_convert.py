"""bnfast.convert and bnfast.revert: the same objects, states and results; what is left alone, and why."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bnfast
from bnfast.modules import plain
from bnfast.modules.drop_in import DropIn
from tests.support.elsewhere import elsewhere  # noqa: F401 - a fixture
from tests.support.training import assert_same_training, record


def network() -> nn.Sequential:
    """Every kind that is converted, and some that are not. Between two norms there is what no norm undoes: a
    gradient that is 0 but for rounding would be compared as noise."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8), nn.SiLU(),
        nn.Conv2d(8, 8, 1, bias=False), nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.SiLU(), nn.LayerNorm((5, 5)), nn.SiLU(), nn.Flatten(2), nn.BatchNorm1d(8), nn.SiLU(),
        nn.InstanceNorm1d(8), nn.SiLU(), nn.Unflatten(2, (5, 5, 1)), nn.BatchNorm3d(8), nn.SiLU(),
        nn.InstanceNorm3d(8, affine=True), nn.SiLU(), nn.Flatten(), nn.Linear(200, 6, bias=False),
        nn.BatchNorm1d(6),
    )  # fmt: skip


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_every_layer_and_back() -> None:
    model = network()
    before, identities = kinds(model), list(map(id, model.modules()))
    state = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    shown = repr(model)
    assert bnfast.convert(model) is model
    for old, module in zip(before, model.modules(), strict=True):
        expected = getattr(bnfast, old.__name__, old) if "Norm" in old.__name__ else old
        assert type(module) is expected
    assert list(map(id, model.modules())) == identities
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == state
    assert repr(model) == shown
    converted = kinds(model)
    assert kinds(bnfast.convert(model)) == converted
    assert bnfast.revert(model) is model
    assert kinds(model) == before
    assert kinds(bnfast.revert(model)) == before
    assert not any("activation" in vars(module) for module in model.modules())


def test_same_training() -> None:
    theirs = network().double()
    ours = bnfast.convert(copy.deepcopy(theirs))
    back = bnfast.revert(bnfast.convert(copy.deepcopy(theirs)))
    expected = record(theirs, batch())
    assert_same_training(record(ours, batch()), expected)
    assert_same_training(record(back, batch()), expected, 0.0)


def test_an_optimizer_goes_on() -> None:
    """Made before, with momentum, and used before and after."""
    results = []
    for converts in (False, True):
        model = network().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(4):
            if converts:
                model = (bnfast.convert, bnfast.revert, bnfast.convert, bnfast.fuse)[step](model)
            optimizer.zero_grad()
            y = model(batch())
            (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).sin().view_as(y)).sum().backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_flags_and_checkpoints_stay(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    model[1].eval()
    model[4].weight.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    ours = bnfast.convert(copy.deepcopy(model))
    assert [module.training for module in ours.modules()] == flags
    assert [p.requires_grad for p in ours.parameters()] == wanted
    assert all(t.dtype in (dtype, torch.int64) for t in ours.state_dict().values())
    assert list(ours.state_dict()) == list(model.state_dict())
    assert ours.load_state_dict(model.state_dict(), strict=True)
    assert model.load_state_dict(ours.state_dict(), strict=True)


def test_on_meta() -> None:
    with torch.device("meta"):
        model = bnfast.convert(network())
    assert all(t.is_meta for t in model.state_dict().values())
    assert type(model[1]) is bnfast.BatchNorm2d


def test_a_model_that_is_one_layer() -> None:
    layer = nn.BatchNorm2d(3)
    assert bnfast.convert(layer) is layer
    assert type(layer) is bnfast.BatchNorm2d


def test_shared_layers_stay_shared() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    bnfast.convert(model)
    assert model["a"] is model["b"][0] is norm
    assert type(norm) is bnfast.BatchNorm2d


def test_hooks_stay() -> None:
    model = network()
    seen: list[str] = []
    layer = model[1]
    layer.register_forward_pre_hook(lambda m, a: seen.append("before"))
    layer.register_forward_hook(lambda m, a, y: seen.append("after"))
    layer.register_full_backward_hook(lambda m, a, b: seen.append("backward"))
    layer.register_state_dict_post_hook(lambda m, s, p, meta: seen.append("state"))
    bnfast.convert(model)
    model(batch(torch.float32)).sum().backward()
    model.state_dict()
    assert seen == ["before", "after", "backward", "state"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = bnfast.convert(network().double().eval())
    again = copied(model)
    assert kinds(again) == kinds(model)
    torch.testing.assert_close(again(batch()), model(batch()))


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", Sine())


def own_forward_attribute() -> nn.Module:
    module = nn.BatchNorm2d(3)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: OwnForward(3), "a subclass of torch.nn.BatchNorm2d"),
    "lazy": (nn.LazyBatchNorm2d, "lazy"),
    "parametrized": (parametrized, "parametrized"),
    "pruned": (lambda: prune.identity(nn.BatchNorm2d(3), "weight"), "pruning"),
    "sync": (lambda: nn.SyncBatchNorm(3), "bnfast has no such layer"),
    "RMSNorm": (lambda: nn.RMSNorm(3), "bnfast has no such layer"),
    "local response": (lambda: nn.LocalResponseNorm(3), "bnfast has no such layer"),
    "patched": (own_forward_attribute, "attributes of its own: forward"),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT.keys())
def test_left_alone_and_listed(
    make: Callable[[], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    kind = type(layer)
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.convert(model)
    assert type(layer) is kind
    assert reason in messages(caplog)
    assert "1 left alone" in messages(caplog)
    assert messages(caplog).endswith(": 1")  # its name in the model


def test_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.convert(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.LayerNorm(3), nn.ReLU()))
    assert "convert: 3 layers; 2 torch.nn.modules.batchnorm.BatchNorm2d -> bnfast." in messages(caplog)
    assert "0 left alone" in messages(caplog)


@pytest.mark.parametrize("function", [bnfast.convert, bnfast.revert])
def test_only_modules(function: Any) -> None:
    with pytest.raises(TypeError, match="takes a torch.nn.Module, but got dict"):
        function({})


def test_a_subclass_of_ours_is_not_reverted(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(bnfast.BatchNorm2d):
        pass

    model = nn.Sequential(Mine(3))
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.revert(model)
    assert type(model[0]) is Mine
    assert "a subclass of bnfast's" in messages(caplog)


WITH_ACTIVATION: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "batch": (lambda: bnfast.BatchNorm2d(4, activation="relu"), (3, 4, 5, 5)),
    "group": (lambda: bnfast.GroupNorm(2, 4, activation=("leaky_relu", 0.2)), (3, 4, 5, 5)),
    "instance": (lambda: bnfast.InstanceNorm1d(4, affine=True, activation="silu"), (3, 4, 5)),
    "layer": (lambda: bnfast.LayerNorm(5, activation="gelu"), (3, 4, 5)),
    "frozen": (lambda: bnfast.FrozenBatchNorm2d(4, activation="relu6"), (3, 4, 5, 5)),
}


@pytest.mark.parametrize(("make", "shape"), WITH_ACTIVATION.values(), ids=WITH_ACTIVATION.keys())
def test_an_activation_survives_reverting(make: Callable[[], Any], shape: tuple[int, ...]) -> None:
    layer = make().double()
    kind, keys = type(layer), list(layer.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    z = torch.randn(shape, dtype=torch.float64)
    expected, added = copy.deepcopy(layer)(x), copy.deepcopy(layer)(x, z)
    reverted: Any = bnfast.revert(layer)
    assert type(reverted) is getattr(plain, kind.__name__)
    assert list(reverted.state_dict()) == keys
    torch.testing.assert_close(copy.deepcopy(reverted)(x), expected)
    torch.testing.assert_close(copy.deepcopy(reverted)(x, z), added)
    with pytest.raises(ValueError, match="residual"):
        reverted(x, z[:1])
    assert reverted.activation == make().activation
    assert "activation=" in repr(reverted)
    assert type(bnfast.convert(reverted)) is kind
    assert reverted.activation == make().activation


def test_batch_renorm_becomes_batch_norm_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(bnfast.BatchRenorm2d(3), bnfast.BatchRenorm1d(3, activation="tanh")).double()
    model[0](batch())
    expected = copy.deepcopy(model[0]).eval()(batch())
    bnfast.revert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert type(model[1]) is plain.BatchNorm1d
    assert "equal in eval only: 0, 1" in messages(caplog)
    torch.testing.assert_close(model[0].eval()(batch()), expected)


def test_converters_that_would_lose_something_are_told() -> None:
    model = nn.Sequential(bnfast.BatchNorm2d(3, activation="relu"))
    with pytest.raises(RuntimeError, match="applies relu itself"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(bnfast.convert(network()))[1]) is nn.SyncBatchNorm
    group = nn.Sequential(bnfast.GroupNorm(1, 3, activation="relu"))
    assert nn.SyncBatchNorm.convert_sync_batchnorm(group)[0] is group[0]  # which it does not touch


def test_quantization_may_mark_layers() -> None:
    layer = bnfast.BatchNorm2d(3, activation="relu")
    assert not hasattr(layer, "qconfig")
    layer.qconfig = 7
    assert copy.deepcopy(layer).qconfig == 7
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


def test_fuse_conv_bn_eval() -> None:
    """Of a converted pair as of torch's; it knows nothing of an activation, and README says so."""
    conv, norm = nn.Conv2d(3, 4, 1).double().eval(), nn.BatchNorm2d(4).double().eval()
    norm.running_mean.normal_()
    x = batch()
    expected = norm(conv(x))
    fused = fuse_conv_bn_eval(conv, bnfast.convert(norm))
    torch.testing.assert_close(fused(x), expected)


def test_ddp(tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch has no torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        theirs = network().double()
        ours = nn.parallel.DistributedDataParallel(bnfast.convert(copy.deepcopy(theirs)))
        assert_same_training(record(ours.module, batch()), record(theirs, batch()))
        ours(batch()).sum().backward()
        assert all(p.grad is not None for p in ours.parameters())
    finally:
        torch.distributed.destroy_process_group()


FROM_ELSEWHERE = {
    "torchvision.ops.misc.FrozenBatchNorm2d": "FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": "FrozenBatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d": "BatchNorm2d",
    "timm.layers.norm_act.GroupNormAct": "GroupNorm",
    "timm.layers.norm.GroupNorm": "GroupNorm",
}


@pytest.mark.parametrize(("name", "target"), FROM_ELSEWHERE.items(), ids=FROM_ELSEWHERE.keys())
def test_layers_of_other_libraries(elsewhere: dict[str, Any], name: str, target: str) -> None:  # noqa: F811
    layer = elsewhere[name](8).double()
    for t in layer.state_dict().values():
        if t.is_floating_point():
            t.copy_(torch.rand_like(t) + 0.5)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False).double(), layer)
    children = list(layer.named_children())
    expected = record(copy.deepcopy(model), batch())
    keys = list(model.state_dict())
    bnfast.convert(model)
    assert type(layer) is getattr(bnfast, target)
    assert list(model.state_dict()) == keys
    if "Act" in name:
        assert layer.activation == bnfast.Activation("relu")
    assert_same_training(record(copy.deepcopy(model), batch()), expected)
    bnfast.revert(model)
    assert type(layer) is elsewhere[name]
    assert list(layer.named_children()) == children
    assert_same_training(record(model, batch()), expected, 0.0)


def test_activations_and_dropout_that_stay_outside(
    elsewhere: dict[str, Any],  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    kind = elsewhere["timm.layers.norm_act.BatchNormAct2d"]
    strange, dropping, fast = kind(3, nn.Softsign), kind(3), elsewhere["timm.layers.norm.GroupNorm"](4)
    dropping.drop = nn.Dropout(0.5)
    fast._fast_norm = True
    hooked = kind(3)
    hooked.act.register_forward_hook(lambda m, a, y: None)
    model = nn.Sequential(strange, dropping, hooked, fast)
    before = kinds(model)
    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.convert(model)
    assert kinds(model) == before
    for reason in ("Softsign", "its dropout, Dropout", "hooks on its activation", "fast norm"):
        assert reason in messages(caplog)


def test_an_activation_changed_since_stays_changed(elsewhere: dict[str, Any]) -> None:  # noqa: F811
    layer = bnfast.convert(elsewhere["timm.layers.norm_act.BatchNormAct2d"](3))
    layer.activation = bnfast.Activation("silu")
    assert type(bnfast.revert(layer)) is plain.BatchNorm2d
    assert layer.activation == bnfast.Activation("silu")


def test_no_layer_of_ours_is_missed() -> None:
    """Every class that bnfast exports has a way back."""
    for name in bnfast.modules.__all__:
        kind = getattr(bnfast, name)
        assert issubclass(kind, DropIn)
        layer = kind(2, 4) if name == "GroupNorm" else kind(4)
        bnfast.revert(layer)
        assert not isinstance(layer, DropIn)
