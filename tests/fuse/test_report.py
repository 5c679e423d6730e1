"""What bnfast.fusion_report and the log say: all of it is true, and each reason is counted."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import nn

import bnfast
from bnfast.fusing import blocks
from tests.support.fused import CHANNELS, conv_norm_act, data, fused_count, pair, reason, tail

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


def test_each_reason_is_counted() -> None:
    alone, pooled = tail(lambda b, y, x: y), tail(lambda b, y, x: torch.max_pool2d(y, 1))
    model = nn.Sequential(pooled(), alone(), conv_norm_act(), alone())
    assert str(bnfast.fusion_report(bnfast.fuse(model))).splitlines() == [
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
    assert reason(bnfast.fuse(model)) == "it is left as it is: it has attributes of its own: activation"


def test_blocks_that_are_left_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    branching = tail(lambda b, y, x: y if x.sum() > 0 else -y)
    with caplog.at_level(logging.INFO, "bnfast"):
        model = bnfast.fuse(nn.Sequential(branching()))
    words = "left as it is: forward branches on a tensor, or on something of one"
    assert f"fuse: 0 is {words}" in caplog.messages
    assert reason(model) == f"its block is {words}"


def _wrong_rewriting(graph: torch.fx.Graph, match: object, site: object) -> None:
    """Uses a node before it is there."""
    with graph.inserting_after(next(iter(graph.nodes))):
        graph.call_function(torch.relu, (graph.output_node().args[0],))


@pytest.mark.parametrize("broken", ["graph", "code"])
def test_what_cannot_be_built_is_left(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "graph":
        monkeypatch.setattr(blocks, "rewrite", _wrong_rewriting)
    else:
        monkeypatch.setattr(torch.fx.Graph, "python_code", lambda self, root: 1 / 0)
    with caplog.at_level(logging.INFO, "bnfast"):
        ours, theirs = pair(conv_norm_act)
    assert "cannot be built: " in reason(ours)
    assert [r.levelname for r in caplog.records if "cannot be built: " in r.message][:1] == ["WARNING"]
    torch.testing.assert_close(ours(data()), theirs(data()))
    assert type(ours) is nn.Sequential


def test_threads_fuse_one_after_another() -> None:
    call = nn.Module.__call__
    counts, start = [], threading.Barrier(4)

    def fuse() -> None:
        model = nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()) for _ in range(10)))
        start.wait()
        counts.append(fused_count(bnfast.fuse(model)))

    threads = [threading.Thread(target=fuse) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [10] * 4
    assert nn.Module.__call__ is call
