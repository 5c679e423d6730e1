"""Other libraries' converters on bnfast's layers: one that would lose an activation or a correction raises an
error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.mkldnn
from torch import nn
from torch.testing import assert_close

import bnfast
from tests.support.convertible import BatchNormAct2d, DetectronFrozen, around, data

pytestmark = [
    pytest.mark.usefixtures("stand_ins"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.* puts a SyncBatchNorm"),
]
sync = nn.SyncBatchNorm.convert_sync_batchnorm


def named(name: str, function: Any) -> Any:
    """A function with the same code under another name."""
    function.__code__ = function.__code__.replace(co_name=name)
    return function


def builder(name: str) -> Callable[[Any], object]:
    """apex's convert_syncbn_model, detectron2's convert_frozen_batchnorm or open_clip's freeze_batch_norm_2d,
    by what these read."""

    def build(model: Any) -> None:
        old, new = model[1], (nn.SyncBatchNorm if "sync" in name else DetectronFrozen)(model[1].num_features)
        if old.affine:
            new.weight.data, new.bias.data = old.weight.data.clone(), old.bias.data.clone()
        new.running_mean.data, new.running_var.data = old.running_mean.data, old.running_var.data
        model[1] = new

    return named(name, build)


BUILDERS = ("convert_frozen_batchnorm", "convert_syncbn_model", "freeze_batch_norm_2d")
CONVERTERS = {"convert_sync_batchnorm": sync, **{name: builder(name) for name in BUILDERS}}
if torch.backends.mkldnn.is_available():
    CONVERTERS["torch.utils.mkldnn"] = lambda model: torch.utils.mkldnn.to_mkldnn(model.float())
OURS = "BatchNorm2d applies relu itself, .* {} builds .*module behind it, which bnfast.fuse takes in"
RENORM = "BatchRenorm2d renormalizes, .* bnfast.revert does"
TIMMS = "applies ReLU itself, .* {} builds .*use timm's convert_sync_batchnorm or"
ACTIVE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (lambda: bnfast.BatchNorm2d(4, activation="relu"), OURS),
    "reverted": (lambda: bnfast.revert(bnfast.BatchNorm2d(4, activation="relu")), OURS),
    "timm's": (lambda: bnfast.convert(BatchNormAct2d(4, nn.ReLU())), TIMMS),
    "Batch Renormalization": (lambda: bnfast.BatchRenorm2d(4), RENORM),
    "both": (lambda: bnfast.BatchRenorm2d(4, activation="relu"), RENORM),
}


# A frozen layer computes what Batch Renormalization computes in eval.
LOSING = [(name, by) for name in ACTIVE for by in CONVERTERS if ACTIVE[name][1] is not RENORM or "sync" in by]


@pytest.mark.parametrize(("name", "converter"), LOSING)
def test_raises_for_what_it_would_lose(name: str, converter: str) -> None:
    make, words = ACTIVE[name]
    model = around(make()).eval()
    kind = type(model[1])
    with pytest.raises(RuntimeError, match=words.format(re.escape(converter))):
        CONVERTERS[converter](model)
    assert type(model[1]) is kind


def test_sync_batchnorm_takes_the_others() -> None:
    """The warning names the line that calls the converter, for each layer."""
    model: Any = nn.Sequential(
        bnfast.BatchNorm2d(4),
        nn.Sequential(nn.Sequential(bnfast.BatchNorm2d(4))),
        bnfast.GroupNorm(2, 4, activation="relu"),
    )
    old = model[0]
    with pytest.warns(UserWarning, match="what bnfast.fuse had put inside.*bnfast.revert") as seen:
        sync(model)
    assert [type(m) for m in model] == [nn.SyncBatchNorm, nn.Sequential, bnfast.GroupNorm]
    for name in ("weight", "bias", "running_var", "num_batches_tracked"):
        assert getattr(model[0], name) is getattr(old, name)
    assert len(seen) >= 2
    assert len({(warning.filename, warning.lineno) for warning in seen}) == 1
    assert seen[0].filename == __file__


def test_sync_batchnorm_gives_up_what_is_fused() -> None:
    model = bnfast.fuse(around(nn.BatchNorm2d(4), nn.ReLU())).eval()
    expected = model(data())
    assert len(bnfast.fusion_report(model).fused) == 1
    model = sync(model)
    assert not bnfast.fusion_report(model).fused
    assert_close(model(data()), expected)


def test_each_takes_the_others() -> None:
    """A frozen layer converts again."""
    for convert in CONVERTERS.values():
        convert(around(bnfast.BatchNorm2d(4)).eval())
    freeze = CONVERTERS["convert_frozen_batchnorm"]
    model = around(bnfast.BatchNorm2d(4)).eval()
    expected = model(data())
    freeze(model)
    assert type(model[1]) is DetectronFrozen
    assert isinstance(bnfast.convert(model.double())[1], bnfast.FrozenBatchNorm2d)
    assert_close(model.train()(data()), expected, rtol=1e-12, atol=1e-12)
    bare = around(bnfast.convert(BatchNormAct2d(4, nn.Identity())))
    freeze(bare)
    assert type(bare[1]) is DetectronFrozen


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no MKLDNN")
def test_mkldnn_computes_the_same() -> None:
    layer, x = around(bnfast.BatchNorm2d(4)).eval().float()[1], torch.randn(3, 4, 5, 6)
    found = torch.utils.mkldnn.to_mkldnn(layer)(x.to_mkldnn()).to_dense()
    assert_close(found, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_somebodys_function_of_the_same_name(name: str) -> None:
    """A function that builds nothing of what it reads is not stopped."""
    function = named(name, lambda layer: layer.eval().affine and layer.num_features)
    for layer in (bnfast.BatchNorm2d(4, activation="relu"), bnfast.BatchRenorm2d(4)):
        assert function(layer) == 4
