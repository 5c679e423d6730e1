"""torchvision's and timm's models and layers, where these are installed: converted, they train as before, to
1e-9 in fp64, and timm's own tools find its layers and lose nothing. `tests/convert/test_convert.py` and
`tests/convert/test_adopted.py` have stand-ins for these layers."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from tests.support.training import assert_same_training, record
from tests.support.zoo import installed

pytestmark = pytest.mark.usefixtures("plain_torch_in_one_thread")
OURS = tuple(getattr(bnfast, name) for name in bnfast.modules.__all__)


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# name: (library, what makes one of its modules, the number of each of bnfast's layers, and of those left)
CASES: dict[str, tuple[str, Callable[[Any], nn.Module], dict[str, int]]] = {
    "resnet18, frozen": (
        "torchvision", lambda tv: tv.models.resnet18(norm_layer=tv.ops.FrozenBatchNorm2d),
        {"FrozenBatchNorm2d": 20},
    ),
    "VisionTransformer": (
        "torchvision", lambda tv: tv.models.VisionTransformer(32, 16, 2, 4, 64, 128), {"LayerNorm": 5}
    ),
    "ConvNeXt": (
        "timm", lambda timm: timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)),
        {"LayerNorm": 4, "left": 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("library", "make", "layers"), CASES.values(), ids=CASES)
def test_zoo(library: str, make: Callable[[Any], nn.Module], layers: dict[str, int]) -> None:
    torch.manual_seed(0)
    theirs = make(installed(library)).double()
    ours = bnfast.convert(copy.deepcopy(theirs))
    norms = [m for m in ours.modules() if isinstance(m, (*OURS, nn.LayerNorm))]
    assert Counter(type(m).__name__ if isinstance(m, OURS) else "left" for m in norms) == layers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_training(record(ours, images()), record(theirs, images()))
    assert [type(m) for m in bnfast.revert(ours).modules()] == [type(m) for m in theirs.modules()]


APPLYING = ("BatchNormAct2d", "FrozenBatchNormAct2d", "GroupNormAct", "GroupNorm1Act", "LayerNormAct")


@pytest.mark.parametrize("name", [*APPLYING, "GroupNorm", "GroupNorm1", "LayerNorm"])
def test_each_of_timms_layers(name: str) -> None:
    """bnfast knows their names, and imports none of them."""
    layers = installed("timm").layers
    kind = getattr(layers.norm_act if name in APPLYING else layers.norm, name)
    layer = kind(32).double()
    x = torch.randn(2, 32, 4, 32, dtype=torch.float64)
    before, children = copy.deepcopy(layer)(x), list(layer.named_children())
    converted = bnfast.convert(layer)
    assert isinstance(converted, OURS)
    assert (converted.activation is None) == (name not in APPLYING)
    assert_close(copy.deepcopy(converted)(x), before, rtol=1e-9, atol=1e-9)
    assert type(bnfast.revert(layer)) is kind
    assert list(layer.named_children()) == children
    assert_close(layer(x), before, rtol=0, atol=0)


# timm's tools

LAYERS = 34  # of mobilenetv3_small_050
STOPPED = "applies Hardswish itself.*use timm's convert_sync_batchnorm or"
Change = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module")
def timm() -> Any:
    return installed("timm")


@pytest.fixture(scope="module")
def original(timm: Any) -> nn.Module:
    """With statistics that are not those of a new model, in eval."""
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=8).double()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


@pytest.fixture(params=[bnfast.convert, bnfast.fuse], ids=["convert", "fuse"])
def change(request: pytest.FixtureRequest) -> Change:
    return request.param


@pytest.fixture
def model(change: Change, original: nn.Module) -> Any:
    return change(copy.deepcopy(original))


def count(model: nn.Module, *kinds: type) -> int:
    return sum(type(module) in kinds for module in model.modules())


def test_freeze_and_unfreeze_batch_norm(change: Change, model: Any, timm: Any, original: nn.Module) -> None:
    expected, layers = original(images()), timm.layers
    frozen = layers.freeze_batch_norm_2d(model)
    constant = installed("torchvision").ops.FrozenBatchNorm2d
    assert count(frozen, layers.FrozenBatchNormAct2d, constant) == LAYERS
    assert_close(frozen.train()(images()), expected)
    again = change(frozen)
    assert sum(isinstance(m, bnfast.FrozenBatchNorm2d) for m in again.modules()) == LAYERS
    assert_close(again(images()), expected)
    unfrozen = layers.unfreeze_batch_norm_2d(again).eval()
    assert count(unfrozen, layers.BatchNormAct2d, nn.BatchNorm2d) == LAYERS
    assert_close(unfrozen(images()), expected)


def test_freeze_and_unfreeze_a_model(model: Any, timm: Any, original: nn.Module) -> None:
    timm.utils.freeze(model, ["conv_stem", "bn1", "blocks.0"], include_bn_running_stats=True)
    assert type(model.bn1) is timm.layers.FrozenBatchNormAct2d
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    assert_close(model(images()), original(images()))
    timm.utils.unfreeze(model, include_bn_running_stats=True)
    assert type(model.bn1) is timm.layers.BatchNormAct2d
    assert_close(model.eval()(images()), original(images()))


def test_synchronized(model: Any, timm: Any, original: nn.Module) -> None:
    """timm's converter keeps the activations; torch's, as Lightning calls it, would not, and is stopped."""
    with pytest.raises(RuntimeError, match=STOPPED):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    with pytest.raises(RuntimeError, match="applies Hardswish itself.*convert_splitbn_model"):
        timm.layers.convert_splitbn_model(copy.deepcopy(model))  # even timm's own layers lose theirs to it
    with pytest.warns(UserWarning, match="what bnfast.fuse had put inside"):
        synced = timm.layers.convert_sync_batchnorm(model)
    assert count(synced, timm.layers.SyncBatchNormAct) == LAYERS
    assert_close(synced(images()), original(images()))


def test_other_tools(timm: Any, original: nn.Module) -> None:
    """Averages, features, pickles and statistics of activations."""
    model = bnfast.fuse(copy.deepcopy(original))
    assert_close(timm.utils.ModelEmaV3(model).module(images()), original(images()))
    assert_close(pickle.loads(pickle.dumps(model))(images()), original(images()))
    seen = []
    for hooked in (copy.deepcopy(original), model):
        function = timm.utils.model.avg_sq_ch_mean
        seen.append(timm.utils.model.ActivationStatsHook(hooked, ["bn1.act"], [function]).stats)
        hooked(images())
    assert_close(*(stats["avg_sq_ch_mean"] for stats in seen))
    assert len(seen[0]["avg_sq_ch_mean"]) == 1
