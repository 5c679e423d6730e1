"""Converted networks train as the original ones do, to 1e-9 in fp64: small ones on the kernels (interpreted),
and in plain torch the models of torchvision and timm, where these are installed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from tests.support.convertible import around, data
from tests.support.foreign import TimmsBlock, TorchvisionFrozen
from tests.support.fused import Residual
from tests.support.training import assert_same_training, record
from tests.support.zoo import installed

OURS = tuple(getattr(bnfast, name) for name in bnfast.modules.__all__)


def every_other_kind() -> nn.Module:
    """torch.nn's other layers, each behind something that makes all its parameters count."""
    return nn.Sequential(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.SiLU(),
        nn.Conv2d(4, 4, 1, bias=False), nn.GroupNorm(2, 4), nn.Tanh(), nn.LayerNorm((5, 6)),
        nn.Flatten(2), nn.BatchNorm1d(4), nn.GELU(), nn.InstanceNorm1d(4), nn.Softplus(),
        nn.Unflatten(2, (5, 3, 2)), nn.BatchNorm3d(4), nn.Sigmoid(), nn.InstanceNorm3d(4, affine=True),
    )  # fmt: skip


SMALL: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: Residual(shortcut=True),
    "ResNet, frozen": lambda: Residual(TorchvisionFrozen, shortcut=True),
    "timm": TimmsBlock,
    "every other kind": every_other_kind,
}


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str, launches: list[Any], stand_ins: None) -> None:
    theirs = around(SMALL[name](), nn.Flatten())
    ours = bnfast.convert(copy.deepcopy(theirs))
    expected = record(copy.deepcopy(theirs), data())
    assert not launches
    assert not [m for m in ours.modules() if "Norm" in type(m).__name__ and not isinstance(m, OURS)]
    assert_same_training(record(copy.deepcopy(ours), data()), expected)
    assert launches
    assert [type(m) for m in bnfast.revert(ours).modules()] == [type(m) for m in theirs.modules()]
    assert_same_training(record(ours, data()), expected, bound=0.0)


class Case(NamedTuple):
    """make: of a library's module. layers: the number of each of bnfast's layers after conversion."""

    library: str
    make: Callable[[Any], nn.Module]
    layers: dict[str, int]
    left: int = 0
    size: int = 64


CASES: dict[str, Case] = {
    "resnet18, frozen": Case(
        "torchvision", lambda tv: tv.models.resnet18(norm_layer=tv.ops.FrozenBatchNorm2d),
        {"FrozenBatchNorm2d": 20},
    ),
    "mobilenet_v3_small": Case("torchvision", lambda tv: tv.models.mobilenet_v3_small(), {"BatchNorm2d": 34}),
    "VisionTransformer": Case(
        "torchvision", lambda tv: tv.models.VisionTransformer(64, 32, 2, 4, 64, 128), {"LayerNorm": 5}
    ),
    "timm efficientnet_b0": Case("timm", lambda t: t.create_model("efficientnet_b0"), {"BatchNorm2d": 49}),
    "timm resnetv2_50x1_bit": Case(
        "timm", lambda timm: timm.create_model("resnetv2_50x1_bit"), {"GroupNorm": 49}, size=32
    ),
    "timm vit_tiny": Case(
        "timm", lambda timm: timm.create_model("vit_tiny_patch16_224", img_size=64), {"LayerNorm": 25}
    ),
    "timm ConvNeXt": Case(
        "timm", lambda timm: timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)),
        {"LayerNorm": 4}, left=5,
    ),
    "timm frozen": Case(
        "timm", lambda timm: timm.layers.freeze_batch_norm_2d(timm.create_model("efficientnet_lite0")),
        {"FrozenBatchNorm2d": 49},
    ),
}  # fmt: skip


def images(size: int) -> Tensor:
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str, plain_torch: None) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    theirs: Any = case.make(installed(case.library)).double()
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it draws the same numbers for both, but makes large networks' gradients small
    ours = bnfast.convert(copy.deepcopy(theirs))
    assert Counter(type(m).__name__ for m in ours.modules() if isinstance(m, OURS)) == case.layers
    assert sum("LayerNorm2d" in type(m).__name__ for m in ours.modules()) == case.left
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_training(record(ours, images(case.size)), record(theirs, images(case.size)))
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_torchvisions_frozen_layer_decides_the_dtype(dtype: torch.dtype) -> None:
    layer = installed("torchvision").ops.FrozenBatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3).to(dtype)
    for constants in (torch.float32, dtype):
        expected = layer.to(constants)(x)
        found = bnfast.convert(copy.deepcopy(layer))(x)
        assert_close(found, expected, rtol=1e-2, atol=1e-2)  # which compares dtypes too


def test_feature_extraction() -> None:
    extract = installed("torchvision.models.feature_extraction").create_feature_extractor
    model = installed("torchvision").models.resnet18().double().eval()
    features = {"layer1.0.bn1": "norm", "layer4": "last"}
    expected = extract(model, features)(images(32))
    assert_close(extract(bnfast.convert(model), features)(images(32)), expected)
