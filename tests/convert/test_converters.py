"""Other libraries' converters on our layers: what would lose an activation or a correction raises."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.utils.mkldnn
from torch import Tensor, nn
from torch.ao.quantization import default_qconfig, propagate_qconfig_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

import bnfast
from bnfast.modules import plain
from tests.support.foreign import BatchNormAct2d, DetectronFrozen, put_in_place


@pytest.fixture(autouse=True)
def _others_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


def data() -> Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), layer).double()
    model(data() + 1)
    return model.eval()


# name: (layer, words of the error)
SILENT_LOSSES: dict[str, tuple[nn.Module, str]] = {
    "activation": (
        bnfast.BatchNorm2d(4, activation="relu"),
        "BatchNorm2d applies relu itself.*module behind",
    ),
    "Batch Renormalization": (bnfast.BatchRenorm2d(4), "BatchRenorm2d renormalizes.*bnfast.revert"),
    "both": (bnfast.BatchRenorm2d(4, activation="relu"), "BatchRenorm2d renormalizes"),
    "reverted": (bnfast.revert(bnfast.BatchNorm2d(4, activation="relu")), "BatchNorm2d applies relu itself"),
}


@pytest.mark.parametrize("name", SILENT_LOSSES)
def test_sync_batchnorm_raises_for_what_it_would_lose(name: str) -> None:
    layer, words = SILENT_LOSSES[name]
    model = network(copy.deepcopy(layer))
    with pytest.raises(RuntimeError, match=words):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is type(layer)


def test_sync_batchnorm_has_begun_by_then() -> None:
    """As README says: it replaces layers as it finds them, and is stopped at the first that would lose."""
    model = nn.Sequential(nn.BatchNorm2d(4), bnfast.BatchRenorm2d(4), nn.BatchNorm2d(4))
    with pytest.raises(RuntimeError, match="renormalizes"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(m) for m in model] == [nn.SyncBatchNorm, bnfast.BatchRenorm2d, nn.BatchNorm2d]


def test_sync_batchnorm_takes_the_others() -> None:
    model = nn.Sequential(bnfast.BatchNorm2d(4), bnfast.GroupNorm(2, 4, activation="relu"))
    old = model[0]
    with pytest.warns(UserWarning, match="what bnfast.fuse had put inside.*bnfast.revert"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(m) for m in model] == [nn.SyncBatchNorm, bnfast.GroupNorm]
    assert model[0].weight is old.weight
    assert not hasattr(model[0], "qconfig")


def test_qconfig_is_an_attribute_like_others() -> None:
    """Quantization sets it, asks for it and deletes it."""
    layer = bnfast.BatchNorm2d(4)
    assert not hasattr(layer, "qconfig")
    with pytest.raises(AttributeError, match="'BatchNorm2d' object has no attribute 'qconfig'"):
        layer.qconfig  # noqa: B018
    layer.qconfig = "set"
    assert copy.deepcopy(layer).qconfig == "set"
    assert nn.SyncBatchNorm.convert_sync_batchnorm(layer).qconfig == "set"
    del layer.qconfig
    assert not hasattr(layer, "qconfig")
    with pytest.raises(AttributeError, match="qconfig"):
        del layer.qconfig
    marked = bnfast.BatchNorm2d(4, activation="relu")
    marked.qconfig = None
    assert marked.qconfig is None
    with pytest.raises(RuntimeError, match="applies relu itself"):  # marked or not
        nn.SyncBatchNorm.convert_sync_batchnorm(marked)


@pytest.mark.parametrize("name", SILENT_LOSSES)
def test_they_can_still_be_traced_by_jit(name: str) -> None:
    model, x = network(copy.deepcopy(SILENT_LOSSES[name][0])), data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x)
    assert_close(traced(x), model(x))


def test_quantization_can_set_its_attribute() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = network(bnfast.BatchNorm2d(4)).float()
        model.qconfig = default_qconfig  # type: ignore[assignment]
        propagate_qconfig_(model)
    assert type(model[1].qconfig) is type(default_qconfig)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_freezing_by_mode_and_gradients(activation: str | None) -> None:
    """The usual freezer: whatever is a _BatchNorm goes to eval and takes no gradients. Nothing is lost."""
    model = network(bnfast.BatchNorm2d(4, activation=activation)).train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval().requires_grad_(False)
    before, expected = copy.deepcopy(model[1].state_dict()), copy.deepcopy(model).eval()(data())
    y = model(data())
    y.sum().backward()
    assert_close(y, expected)
    assert model[1].weight.grad is None
    assert model[0].weight.grad is not None
    assert_close(model[1].state_dict(), before, rtol=0, atol=0)


def test_freezing_by_replacement() -> None:
    """Freezers that build a layer of their own read the same attributes, and are stopped where the activation
    would be left out; what they make of others converts again."""
    model = network(bnfast.BatchNorm2d(4))
    expected = model(data())
    frozen = DetectronFrozen.convert_frozen_batchnorm(copy.deepcopy(model))
    assert type(frozen[1]) is DetectronFrozen
    ours = bnfast.convert(frozen.double())
    assert isinstance(ours[1], bnfast.FrozenBatchNorm2d)
    assert_close(ours.train()(data()), expected, rtol=1e-12, atol=1e-12)
    for layer in (bnfast.BatchNorm2d(4, activation="relu"), plain.BatchNorm2d(4)):
        layer.activation = bnfast.Activation("relu")
        with pytest.raises(
            RuntimeError, match="applies relu itself.* convert_frozen_batchnorm .*bnfast.fuse"
        ):
            DetectronFrozen.convert_frozen_batchnorm(network(layer))


def convert_syncbn_model(module: Any) -> nn.Module:
    """apex's, by what it reads."""
    synced = nn.SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
    synced.running_mean, synced.running_var = module.running_mean, module.running_var
    return synced


def freeze_batch_norm_2d(module: Any) -> nn.Module:
    """open_clip's, by what it reads."""
    frozen = DetectronFrozen(module.num_features, module.eps)
    if module.affine:
        frozen.weight.data = module.weight.data.clone()
    frozen.running_mean.data, frozen.running_var.data = module.running_mean.data, module.running_var.data
    return frozen


@pytest.mark.parametrize("replace", [convert_syncbn_model, freeze_batch_norm_2d])
@pytest.mark.filterwarnings("ignore:convert_syncbn_model puts a SyncBatchNorm")
def test_others_that_replace_layers(replace: Any) -> None:
    replace(bnfast.BatchNorm2d(4))
    layers = [bnfast.BatchNorm2d(4, activation="relu"), bnfast.convert(BatchNormAct2d(4, nn.ReLU()))]
    for layer in layers:
        with pytest.raises(RuntimeError, match=f"applies (relu|ReLU) itself.* {replace.__name__} "):
            replace(layer)


@pytest.mark.parametrize("name", ["freeze_batch_norm_2d", "convert_frozen_batchnorm", "convert_syncbn_model"])
def test_somebodys_function_of_the_same_name(name: str) -> None:
    """Which builds nothing of what it reads."""
    functions: dict[str, Any] = {}
    exec(f"def {name}(layer):\n    return layer.eval().affine and layer.num_features", functions)
    for layer in (bnfast.BatchNorm2d(4, activation="relu"), bnfast.BatchRenorm2d(4)):
        assert functions[name](layer) == 4


def test_the_warning_is_where_the_converter_is_called() -> None:
    model = nn.Sequential(bnfast.BatchNorm2d(4), nn.Sequential(nn.Sequential(bnfast.BatchNorm2d(4))))
    with pytest.warns(UserWarning, match="puts a SyncBatchNorm") as seen:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert len(seen) >= 2
    assert {warning.filename for warning in seen} == {__file__}
    assert len({warning.lineno for warning in seen}) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mkldnns_conversion() -> None:
    to_mkldnn = torch.utils.mkldnn.to_mkldnn
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no MKLDNN")
    layer, x = network(bnfast.BatchNorm2d(4)).float()[1], data().float()
    assert_close(to_mkldnn(layer)(x.to_mkldnn()).to_dense(), layer(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="applies relu itself.*torch.utils.mkldnn"):
        to_mkldnn(network(bnfast.BatchNorm2d(4, activation="relu")).float())


def test_plain_layers_say_that_jit_cannot_script_them() -> None:
    layer = bnfast.revert(bnfast.BatchNorm2d(4, activation="relu"))
    assert type(layer) is plain.BatchNorm2d
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(RuntimeError, match="which has no activation"):
            torch.jit.script(layer)
