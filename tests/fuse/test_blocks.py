"""bnfast.fuse on small blocks: what it fuses, and what it leaves and why."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from bnfast import dispatch
from tests.support import block_forms as forms
from tests.support.block_forms import CHANNELS, FUSABLE, NOT_FUSABLE, Block, Nested, network
from tests.support.fused import data, fused_count, pair
from tests.support.training import assert_same_training, record


@pytest.mark.parametrize("name", FUSABLE)
def test_fuses(name: str, calls: list[tuple[str | None, bool]]) -> None:
    make, activation, residual = FUSABLE[name]
    ours, theirs = pair(make)
    # The slope of torch's hardsigmoid is 1/6 in fp32 (off by 3e-8) for fp64 input too; the kernels' is not.
    bound = 1e-7 if activation == "hardsigmoid" and dispatch.INTERPRET else 1e-9
    assert_same_training(record(ours, data()), record(theirs, data()), bound)
    assert calls == 3 * [(activation, residual)]  # two steps and an eval
    report = bnfast.fusion_report(ours)
    assert [(f.activation.name, f.residual, f.block) for f in report.fused] == [(activation, residual, "")]
    assert report.skipped == ()


@pytest.mark.parametrize("name", NOT_FUSABLE)
def test_leaves(name: str, calls: list[tuple[str | None, bool]]) -> None:
    make, words = NOT_FUSABLE[name]
    state = random.getstate()
    ours, theirs = pair(make)
    assert random.getstate() == state
    (skipped,) = bnfast.fusion_report(ours).skipped
    assert words in skipped.reason
    assert type(ours) is type(theirs)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(data()), theirs(data()))
    assert calls == [(None, False)]


def test_every_parameter_of_an_activation_counts() -> None:
    for name, parameter in {"leaky_relu": 0.2, "LeakyReLU": 0.3, "elu": 0.5, "ELU": 0.7}.items():
        (fused,) = bnfast.fusion_report(bnfast.fuse(FUSABLE[name][0]())).fused
        assert fused.activation.parameter == parameter


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), bnfast.BatchRenorm2d])
def test_network(norm: Callable[[int], nn.Module]) -> None:
    theirs = bnfast.convert(network(norm))
    ours = bnfast.fuse(copy.deepcopy(theirs))
    report = bnfast.fusion_report(ours)
    assert (len(report.fused), sum(f.residual for f in report.fused)) == (5, 2)
    assert [s.norm for s in report.skipped] == ["2.downsample.1"]
    assert "5 fused, 1 not" in str(report)
    assert_same_training(record(ours, data()), record(theirs, data()))


def test_the_last_layer_of_a_sequential(calls: list[tuple[str | None, bool]]) -> None:
    ours, theirs = pair(Nested)
    assert_same_training(record(ours, data()), record(theirs, data()))
    assert calls == 3 * [("relu", False), ("relu", True)]
    assert [f.block for f in bnfast.fusion_report(ours).fused] == ["first", ""]


def test_a_residual_that_needs_broadcasting_or_casting(calls: list[tuple[str | None, bool]]) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            y = self.norm(x)
            y += z
            return F.relu(y)

    ours, theirs = pair(Adds)
    for z in (data(1)[:, :, :1], data(1).float(), data(1)):
        torch.testing.assert_close(ours(data(), z), theirs(data(), z))
    assert calls == [(None, False), (None, False), ("relu", True)]


def test_other_arguments_take_the_original_forward() -> None:
    ours, theirs = pair(forms.Optional)
    assert fused_count(ours) == 1
    for args, kwargs in (((data(),), {}), ((data(), data(1)), {}), ((), {"x": data()}), ((data(), None), {})):
        torch.testing.assert_close(ours(*args, **kwargs), theirs(*args, **kwargs))


def test_a_tensor_that_is_no_block_input(calls: list[tuple[str | None, bool]]) -> None:
    """A parameter as the residual: read anew with each call."""
    ours, theirs = pair(lambda: _with_parameter())
    with torch.no_grad():
        for model in (ours, theirs):
            model.offset = nn.Parameter(data(2))
    assert_same_training(record(ours, data()), record(theirs, data()))
    assert calls == 3 * [("relu", True)]


def _with_parameter() -> nn.Module:
    block = Block(lambda b, y, x: F.relu(y + b.offset))
    block.offset = nn.Parameter(torch.zeros(3, CHANNELS, 4, 4))
    return block


def test_a_list_that_forward_writes_to_is_put_back() -> None:
    block = Block(lambda b, y, x: (b.seen.append(1), F.relu(y))[1])
    block.seen = [0]
    model = bnfast.fuse(block)
    assert model.seen == [0]
    assert "writes to seen" in bnfast.fusion_report(model).skipped[0].reason
