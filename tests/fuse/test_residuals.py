"""Residuals that an earlier fused call has made, and forwards that cannot be built."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from bnfast.fusing import blocks
from tests.support.block_forms import CHANNELS, conv_norm_act
from tests.support.fused import data, fused_count, pair
from tests.support.training import assert_same_training, record

pytestmark = pytest.mark.usefixtures("plain_torch")


class Two(nn.Module):
    """Two layers, and then what `tail` makes of them."""

    def __init__(self, tail: Callable[..., Tensor], count: int = 2) -> None:
        super().__init__()
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(CHANNELS) for _ in range(3))
        self.conv, self.relu, self.id = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(), nn.Identity()
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, x)


def _modules(b: Two, x: Tensor) -> Tensor:
    h = b.relu(b.bn1(x))
    return b.relu(b.bn2(b.conv(h)) + h)


def _functions(b: Two, x: Tensor) -> Tensor:
    h = F.relu(b.bn1(x))
    return F.relu(b.bn2(b.conv(h)) + h)


def _in_place(b: Two, x: Tensor) -> Tensor:
    h = F.silu(b.bn1(x))
    y = b.bn2(b.conv(h))
    y += h
    return F.relu_(y)


def _other_way_round(b: Two, x: Tensor) -> Tensor:
    h = F.relu(b.bn1(x))
    return F.relu(h + b.id(b.bn2(b.conv(h))))


def _straight_on(b: Two, x: Tensor) -> Tensor:
    h = F.relu(b.bn1(x))
    return F.relu(torch.add(b.bn2(h), h))


def _loop(b: Two, x: Tensor) -> Tensor:
    for _ in range(3):
        x = F.relu(b.bn1(x) + x)
    return x


def _three(b: Two, x: Tensor) -> Tensor:
    for norm in (b.bn1, b.bn2, b.bn3):
        x = b.relu(norm(x) + x)
    return x


def _residual_of_a_residual(b: Two, x: Tensor) -> Tensor:
    first = F.relu(b.bn1(x) + x)
    second = F.relu(b.bn2(first) + first)
    return F.relu(b.bn3(second) + first) + second


FORMS = {
    _modules: 2,
    _functions: 2,
    _in_place: 2,
    _other_way_round: 2,
    _straight_on: 2,
    _loop: 1,
    _three: 3,
    _residual_of_a_residual: 3,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_residual_that_an_earlier_call_has_made(form: Callable[..., Tensor]) -> None:
    ours, theirs = pair(lambda: Two(form))
    assert fused_count(ours) == FORMS[form]
    assert_same_training(record(ours, data()), record(theirs, data()))


def _wrong_rewriting(graph: torch.fx.Graph, match: object, site: object) -> None:
    """Uses a node before it is there."""
    first, last = next(iter(graph.nodes)), graph.output_node()
    with graph.inserting_after(first):
        graph.call_function(torch.relu, (last.args[0],))


@pytest.mark.parametrize("broken", ["graph", "code"])
def test_what_cannot_be_built_is_left(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = conv_norm_act().double()
    if broken == "graph":
        monkeypatch.setattr(blocks, "rewrite", _wrong_rewriting)
    else:
        monkeypatch.setattr(torch.fx.Graph, "python_code", lambda self, root: 1 / 0)
    with caplog.at_level(logging.INFO, "bnfast"):
        ours = bnfast.fuse(conv_norm_act().double())
    ours.load_state_dict(theirs.state_dict())
    (skipped,) = bnfast.fusion_report(ours).skipped
    assert "cannot be built: " in skipped.reason
    assert [r.levelname for r in caplog.records if "cannot be built: " in r.message][:1] == ["WARNING"]
    torch.testing.assert_close(ours(data()), theirs(data()))
    assert type(ours) is nn.Sequential


def test_blocks_that_are_left_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(x)) if x.sum() > 0 else x

    with caplog.at_level(logging.INFO, "bnfast"):
        bnfast.fuse(nn.Sequential(Asks()))
    assert "fuse: 0 is left as it is: forward branches on a tensor, or on something of one" in caplog.messages
