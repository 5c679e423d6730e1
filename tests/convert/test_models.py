"""Converted networks train as the original ones do, to 1e-9 in fp64: small ones here, in the block forms of
ResNet, MobileNetV3 and timm, on the kernels (interpreted) and in plain torch; torchvision's and timm's where
these are installed, in plain torch."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnfast
from tests.support.foreign import BatchNormAct2d, TorchvisionFrozen, put_in_place
from tests.support.training import assert_same_training, record
from tests.support.zoo import installed


class Bottleneck(nn.Module):
    """ResNet-50's block, with a projection."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.reduce, self.norm1 = nn.Conv2d(8, 4, 1, bias=False), norm(4)
        self.spatial, self.norm2 = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False), norm(4)
        self.expand, self.norm3 = nn.Conv2d(4, 16, 1, bias=False), norm(16)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), norm(16))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.reduce(x)))
        y = torch.relu(self.norm2(self.spatial(y)))
        return torch.relu(self.norm3(self.expand(y)) + self.shortcut(x))


class Inverted(nn.Module):
    """MobileNetV3's block: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self) -> None:
        super().__init__()

        def layers(i: int, o: int, k: int, groups: int, *act: nn.Module) -> nn.Sequential:
            conv = nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(o, eps=0.001, momentum=0.01), *act)

        self.expand = layers(8, 16, 1, 1, nn.Hardswish(inplace=True))
        self.depthwise = layers(16, 16, 3, 16, nn.Hardswish(inplace=True))
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Hardsigmoid())
        self.project = layers(16, 8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.excite(y))


class Timms(nn.Module):
    """timm's form of a residual block: activations within the layers, but for the one behind the add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(8, nn.SiLU(inplace=True))
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(8, nn.Identity())
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


class EveryKind(nn.Sequential):
    """torch.nn's other layers, each behind something that makes all its parameters count."""

    def __init__(self) -> None:
        super().__init__(
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.SiLU(),
            nn.Conv2d(8, 4, 1, bias=False), nn.GroupNorm(2, 4), nn.Tanh(), nn.LayerNorm((6, 6)),
            nn.Flatten(2), nn.BatchNorm1d(4), nn.GELU(), nn.InstanceNorm1d(4), nn.Softplus(),
            nn.Unflatten(2, (6, 3, 2)), nn.BatchNorm3d(4), nn.Sigmoid(), nn.InstanceNorm3d(4, affine=True),
        )  # fmt: skip


OURS = tuple(getattr(bnfast, name) for name in bnfast.modules.__all__)
SMALL: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: Bottleneck(nn.BatchNorm2d),
    "ResNet, GroupNorm": lambda: Bottleneck(lambda channels: nn.GroupNorm(2, channels)),
    "ResNet, frozen": lambda: Bottleneck(TorchvisionFrozen),
    "MobileNetV3": Inverted,
    "timm": Timms,
    "every other kind": EveryKind,
}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), SMALL[name](), nn.Flatten()).double()


def images(size: int) -> Tensor:
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


ON_KERNELS = ("ResNet", "ResNet, frozen", "timm", "every other kind")
BOTH = [("torch", name) for name in SMALL] + [("kernels", name) for name in ON_KERNELS]


@pytest.mark.parametrize(("path", "name"), BOTH, indirect=["path"])
def test_small_networks(name: str, path: str, stand_ins: None) -> None:
    theirs = small(name)
    ours = bnfast.convert(copy.deepcopy(theirs))
    kinds = [type(m) for m in theirs.modules()]
    expected = record(copy.deepcopy(theirs), images(6))
    assert not [m for m in ours.modules() if "Norm" in type(m).__name__ and not isinstance(m, OURS)]
    assert_same_training(record(copy.deepcopy(ours), images(6)), expected)
    assert [type(m) for m in bnfast.revert(ours).modules()] == kinds
    assert_same_training(record(ours, images(6)), expected, bound=0.0)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("path", ["torch"], indirect=True)
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_data_parallel(wrapped_first: bool, path: str, alone: None, stand_ins: None) -> None:
    """Converted before or, layers being the same objects, after the model is wrapped."""
    ddp = nn.parallel.DistributedDataParallel
    ours = ddp(small("timm")) if wrapped_first else bnfast.convert(small("timm"))
    ours = bnfast.convert(ours) if wrapped_first else ddp(ours)
    assert sum(isinstance(m, OURS) for m in ours.modules()) == 2
    assert_same_training(record(ours, images(6)), record(ddp(small("timm")), images(6)))


class Case(NamedTuple):
    library: str
    make: Callable[[Any], nn.Module]
    layers: dict[str, int]  # of bnfast's, after conversion
    left: int = 0
    size: int = 64


def _without_dropout(model: nn.Module) -> nn.Module:
    """Which draws the same numbers for both, but makes large networks' gradients small."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _frozen(torchvision: Any) -> nn.Module:
    return torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)  # type: ignore[no-any-return]


def _frozen_by_timm(timm: Any) -> nn.Module:
    return timm.layers.freeze_batch_norm_2d(timm.create_model("efficientnet_lite0"))  # type: ignore[no-any-return]


def _small_convnext(timm: Any) -> nn.Module:
    return timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64))  # type: ignore[no-any-return]


CASES: dict[str, Case] = {
    "resnet18": Case("torchvision", lambda tv: tv.models.resnet18(), {"BatchNorm2d": 20}),
    "resnet18, frozen": Case("torchvision", _frozen, {"FrozenBatchNorm2d": 20}),
    "mobilenet_v3_small": Case("torchvision", lambda tv: tv.models.mobilenet_v3_small(), {"BatchNorm2d": 34}),
    "VisionTransformer": Case(
        "torchvision", lambda tv: tv.models.VisionTransformer(64, 32, 2, 4, 64, 128), {"LayerNorm": 5}
    ),
    "timm efficientnet_b0": Case(
        "timm", lambda timm: timm.create_model("efficientnet_b0"), {"BatchNorm2d": 49}
    ),
    "timm resnetv2_50x1_bit": Case(
        "timm", lambda timm: timm.create_model("resnetv2_50x1_bit"), {"GroupNorm": 49}, size=32
    ),
    "timm vit_tiny": Case(
        "timm", lambda timm: timm.create_model("vit_tiny_patch16_224", img_size=64), {"LayerNorm": 25}
    ),
    "timm ConvNeXt": Case("timm", _small_convnext, {"LayerNorm": 4}, left=5),
    "timm frozen": Case("timm", _frozen_by_timm, {"FrozenBatchNorm2d": 49}),
}


@pytest.mark.parametrize("path", ["torch"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str, path: str) -> None:
    case = CASES[name]
    library = installed(case.library)
    torch.manual_seed(0)
    theirs = _without_dropout(case.make(library)).double()
    kinds = [type(m) for m in theirs.modules()]
    ours = bnfast.convert(copy.deepcopy(theirs))
    assert Counter(type(m).__name__ for m in ours.modules() if isinstance(m, OURS)) == case.layers
    norms = [m for m in ours.modules() if "LayerNorm2d" in type(m).__name__]
    assert len(norms) == case.left
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_training(record(ours, images(case.size)), record(theirs, images(case.size)))
    assert [type(m) for m in bnfast.revert(ours).modules()] == kinds


TIMMS = (
    "BatchNormAct2d", "FrozenBatchNormAct2d", "GroupNormAct", "GroupNorm1Act", "LayerNormAct",
    "GroupNorm", "GroupNorm1", "LayerNorm",
)  # fmt: skip


@pytest.mark.parametrize("name", TIMMS)
def test_each_of_timms_layers(name: str) -> None:
    """Whose names bnfast knows by heart."""
    timm = installed("timm")
    place = timm.layers.norm_act if name.endswith(("Act", "2d")) else timm.layers.norm
    layer = getattr(place, name)(32).double()
    x = torch.randn(2, 32, 4, 32, dtype=torch.float64)
    before, children = copy.deepcopy(layer)(x), list(layer.named_children())
    converted = bnfast.convert(layer)
    assert isinstance(converted, OURS)
    assert (converted.activation is None) == (name not in TIMMS[:5])
    torch.testing.assert_close(copy.deepcopy(converted)(x), before, rtol=1e-9, atol=1e-9)
    assert type(bnfast.revert(layer)) is getattr(place, name)
    assert list(layer.named_children()) == children
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_torchvisions_frozen_layer_decides_the_dtype(dtype: torch.dtype) -> None:
    layer = installed("torchvision").ops.FrozenBatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3).to(dtype)
    for constants in (torch.float32, dtype):
        expected = layer.to(constants)(x)
        found = bnfast.convert(copy.deepcopy(layer))(x)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # which compares dtypes too


def test_feature_extraction() -> None:
    extraction = installed("torchvision.models.feature_extraction")
    model = installed("torchvision").models.resnet18().double().eval()
    features = {"layer1.0.bn1": "norm", "layer4": "last"}
    expected = extraction.create_feature_extractor(model, features)(images(32))
    found = extraction.create_feature_extractor(bnfast.convert(model), features)(images(32))
    torch.testing.assert_close(found, expected)
