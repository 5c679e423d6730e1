"""bnfast.fuse on whole models: how many sites, and the same training to 1e-9 in fp64."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import bnfast
from tests.support.fused import fused_count, pair
from tests.support.training import assert_same_training, record
from tests.support.zoo import installed

# Whole models are too much for the interpreter; test_blocks.py has kernels under fused blocks.
pytestmark = pytest.mark.usefixtures("plain_torch")


class Case(NamedTuple):
    make: Callable[[Any], nn.Module]
    shape: tuple[int, ...]
    fused: int
    residual: int
    layers: int
    library: str = "torchvision"


IMAGE = (2, 3, 64, 64)
CASES = {
    # in every environment
    "the benchmarks' resnet50": Case(
        lambda benchmarks: benchmarks.resnet50(width=8), (2, 3, 32, 32), 49, 16, 53, "benchmarks.resnet"
    ),
    "resnet18": Case(lambda tv: tv.models.resnet18(), IMAGE, 17, 8, 20),
    "resnet18, GroupNorm": Case(
        lambda tv: tv.models.resnet18(norm_layer=lambda c: nn.GroupNorm(8, c)), IMAGE, 17, 8, 20
    ),
    "r3d_18": Case(lambda tv: tv.models.video.r3d_18(), (2, 3, 4, 24, 24), 17, 8, 20),
    "fcn_resnet50": Case(
        lambda tv: tv.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None),
        (2, 3, 32, 32), 50, 16, 54,
    ),
    "mobilenet_v3_small": Case(lambda tv: tv.models.mobilenet_v3_small(), IMAGE, 23, 0, 34),
    "efficientnet_b0": Case(lambda tv: tv.models.efficientnet_b0(), IMAGE, 33, 0, 49),
    "regnet_y_400mf": Case(lambda tv: tv.models.regnet_y_400mf(), IMAGE, 49, 16, 53),
    "timm resnet50": Case(lambda timm: timm.create_model("resnet50"), IMAGE, 49, 16, 53, "timm"),
    "timm resnet50_gn": Case(lambda timm: timm.create_model("resnet50_gn"), IMAGE, 49, 16, 53, "timm"),
    # BatchNormAct2d, whose activation is the converted layer's own
    "timm resnetv2_50": Case(
        lambda timm: timm.create_model("resnetv2_50", norm_layer="batchnorm2d"), IMAGE, 49, 0, 49, "timm"
    ),
}  # fmt: skip


def pair_of(name: str) -> tuple[Any, Any]:
    case = CASES[name]
    library = installed(case.library)
    return pair(lambda: case.make(library))


@pytest.mark.parametrize("name", CASES)
def test_sites_and_training(name: str) -> None:
    ours, theirs = pair_of(name)
    case = CASES[name]
    report = bnfast.fusion_report(ours)
    assert (len(report.fused), sum(f.residual for f in report.fused)) == (case.fused, case.residual)
    assert len(report.fused) + len(report.skipped) == case.layers
    classes = [type(m) for m in theirs.modules()]
    x = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = [ours]
    if name in ("resnet18", "r3d_18", "fcn_resnet50"):
        trained.append(pickle.loads(pickle.dumps(ours)))
        assert bnfast.fusion_report(trained[1]) == report
    expected = record(theirs, x)
    for model in trained:
        assert_same_training(record(model, x), expected)
    assert [type(m) for m in bnfast.revert(ours).modules()] == classes


def test_feature_extractor() -> None:
    ours, theirs = pair_of("resnet18")
    extraction = installed("torchvision.models.feature_extraction")
    nodes = {"layer1.0.relu": "first", "layer4": "last"}
    x = torch.randn(IMAGE, dtype=torch.float64)
    found, expected = (extraction.create_feature_extractor(m.eval(), nodes)(x) for m in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_grad_checkpointing_switched_on_later() -> None:
    """The root's forward reads the switch, so the stem is fused only while it is off."""
    ours, theirs = pair_of("timm resnet50")
    for model in (ours, theirs):
        model.set_grad_checkpointing(True)
    assert fused_count(ours) == 48
    x = torch.randn(IMAGE, dtype=torch.float64)
    assert_same_training(record(ours, x, steps=1), record(theirs, x, steps=1))


def test_compiles_in_one_graph() -> None:
    ours, theirs = pair_of("resnet18")
    x = torch.randn(IMAGE, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x))
