"""What bnfast.fusion_report says: all of it is true, and each reason is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from tests.support.block_forms import CHANNELS, Block, conv_norm_act, network
from tests.support.fused import data, fused_count, pair
from tests.support.training import assert_same_training, record
from tests.support.zoo import installed

pytestmark = pytest.mark.usefixtures("plain_torch")


@pytest.mark.parametrize("name", ["fuse", "unfuse", "fusion_report"])
def test_takes_modules_only(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^bnfast\.{name} takes a torch.nn.Module, but got NoneType$"):
        getattr(bnfast, name)(None)


def test_activations_that_are_built_in_count() -> None:
    model = bnfast.fuse(nn.Sequential(bnfast.BatchNorm2d(CHANNELS, activation="hardswish"), *conv_norm_act()))
    report = bnfast.fusion_report(model)
    fused = [(f.norm, f.activation.name, f.block) for f in report.fused]
    assert fused == [("0", "hardswish", None), ("2", "relu", "")]
    assert str(report).splitlines() == [
        "2 fused, 0 not",
        "0: hardswish is built in",
        "2: relu fused in, in the forward of the model",
    ]


def test_activations_that_convert_has_taken_in_count() -> None:
    timm = installed("timm")
    model = bnfast.fuse(timm.create_model("mobilenetv3_small_050"))
    first, second, *_ = str(bnfast.fusion_report(model)).splitlines()
    assert first == "23 fused, 11 not"
    assert second.startswith("11 not: its output is the block's: blocks.0.0.bn2, ")


def test_a_shortcut_is_the_residual() -> None:
    report = bnfast.fusion_report(bnfast.fuse(network()))
    assert report.skipped == (("2.downsample.1", "it is the residual of bn2"),)


def _alone(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return y


def _pooled(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return torch.max_pool2d(y, 1)


def test_each_reason_is_counted() -> None:
    alike = nn.Sequential(Block(_pooled), Block(_alone), conv_norm_act(), Block(_alone))
    assert str(bnfast.fusion_report(bnfast.fuse(alike))).splitlines() == [
        "1 fused, 3 not",
        "2 not: its output is the block's: 1.norm, 3.norm",
        "1 not: max_pool2d follows it, and no activation: 0.norm",
        "2.1: relu fused in, in the forward of 2",
    ]


def test_a_model_that_is_not_converted() -> None:
    model = conv_norm_act()
    model.append(type("Other", (nn.BatchNorm2d,), {})(CHANNELS))
    own, other = bnfast.fusion_report(model).skipped
    assert own == ("1", "bnfast.fuse (or bnfast.convert) has not been called")
    assert other.reason.endswith("Other is no layer of bnfast")


def test_a_layer_that_was_not_converted_says_why() -> None:
    model = conv_norm_act()
    model[1].activation = "relu"
    (skipped,) = bnfast.fusion_report(bnfast.fuse(model)).skipped
    assert skipped.reason == "it is left as it is: it has attributes of its own: activation"


def _on_device(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) + torch.zeros(1, device=x.device)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (_on_device, "gives torch.zeros something of its input, which torch.fx does not record there"),
        (lambda b, y, x: F.relu(y) if isinstance(x, Tensor) else y, "asks for the type of its input"),
    ],
)
def test_the_true_reason(tail: Callable[..., Tensor], reason: str) -> None:
    (skipped,) = bnfast.fusion_report(bnfast.fuse(Block(tail))).skipped
    assert skipped.reason == f"its block is left as it is: forward {reason}"


def _dropout(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.dropout(F.relu(y), 0.0, b.training)


def _branch(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * 2 if b.training else F.silu(y + x)


def _only_in_inference(b: Any, y: Tensor, x: Tensor) -> Tensor:
    if b.training:
        b.last = y
    return F.relu(y)


@pytest.mark.parametrize("fused_in", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("tail", "sites"), [(_dropout, (1, 1)), (_branch, (1, 1)), (_only_in_inference, (0, 1))]
)
def test_both_modes_are_fused(tail: Callable[..., Tensor], sites: tuple[int, int], fused_in: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = Block(tail).double(), Block(tail).double()
    ours.load_state_dict(theirs.state_dict())
    bnfast.fuse(ours.train(fused_in))
    for training in (True, False, True):
        assert fused_count(ours.train(training)) == sites[not training]
        torch.testing.assert_close(ours(data()), theirs.train(training)(data()))
    assert_same_training(record(ours, data()), record(theirs, data()))


def test_both_modes_compile_in_one_graph() -> None:
    ours, theirs = pair(lambda: Block(_branch))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for training in (True, False):
        torch.testing.assert_close(compiled.train(training)(data()), theirs.train(training)(data()))


def test_the_reason_is_that_of_the_mode() -> None:
    ours, _ = pair(lambda: Block(_branch))
    ours.extra = 1
    ours.kind = _dropout
    (skipped,) = bnfast.fusion_report(ours).skipped
    assert skipped.reason == "its block's kind has changed"
