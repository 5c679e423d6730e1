"""bnfast.fuse on small blocks: what it fuses, what it leaves and why, and what happens when something changes
that a forward depends on."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from bnfast import dispatch
from tests.support import changed_forms, left_forms
from tests.support.changed_forms import CHANGES, OUTSIDE
from tests.support.fusable_forms import FUSABLE, add_in_place
from tests.support.fused import Residual, data, fused_count, network, pair, reason, tail
from tests.support.left_forms import LEFT
from tests.support.training import assert_same_training, record
from tests.support.versions import TORCH


@pytest.fixture(autouse=True)
def _outside_as_before() -> Iterator[None]:
    yield
    changed_forms.put_back()


@pytest.mark.parametrize("name", FUSABLE)
def test_fuses(name: str, calls: list[tuple[str | None, bool]]) -> None:
    make, sites = FUSABLE[name]
    expected = [(bnfast.Activation.of(activation), residual) for activation, residual in sites]
    ours, theirs = pair(make)
    # The slope of torch's hardsigmoid is 1/6 in fp32 (off by 3e-8) for fp64 input too; the kernels' is not.
    bound = 1e-7 if name == "Hardsigmoid" and dispatch.INTERPRET else 1e-9
    assert_same_training(record(ours, data()), record(theirs, data()), bound)
    assert calls == 3 * [(activation.name, residual) for activation, residual in expected]  # 2 steps, an eval
    report = bnfast.fusion_report(ours)
    assert {(f.activation, f.residual) for f in report.fused} == {*expected}
    assert {f.block for f in report.fused} == {"", *(["first"] if name == "the last of a Sequential" else [])}
    assert report.skipped == ()


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("name", LEFT)
def test_leaves(name: str, calls: list[tuple[str | None, bool]]) -> None:
    make, words = LEFT[name]
    before = left_forms.state()
    ours, theirs = pair(make)
    found = reason(ours)
    assert words in found
    assert left_forms.state() == before
    assert {n: v for n, v in vars(ours).items() if n[0] != "_"} == {
        n: v for n, v in vars(theirs).items() if n[0] != "_"
    }
    assert type(ours) is type(theirs)
    assert_same_training(record(ours, data()), record(theirs, data()))
    assert calls == 3 * [(None, False)]


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, change, left = CHANGES[name]
    ours, theirs = pair(make)
    before = fused_count(ours)
    assert before == 5 if make is network else 1 <= before <= 2
    assert_same_training(record(copy.deepcopy(ours), data()), record(copy.deepcopy(theirs), data()))
    change(ours, monkeypatch), change(theirs, monkeypatch)
    assert fused_count(ours) == left
    if name in OUTSIDE:
        assert reason(ours).endswith("which its block reads, has changed")
    assert_same_training(record(ours, data()), record(theirs, data()))
    if name in OUTSIDE:
        monkeypatch.undo()
        changed_forms.put_back()
        assert fused_count(ours) == before


@pytest.mark.parametrize(
    "name",
    ["number", "nested", "function", "object", "attribute of a base", "closure", "default", "set", "partial"]
    + ["hasattr", "method", "list in a list", "one of two names", "property", "plain attribute", "mode"],
)
def test_compiles_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if TORCH < (2, 14) and name in ("attribute of a base", "default"):
        pytest.skip("2.11's Dynamo has no guards for what this reads")
    make, change, _ = CHANGES[name]
    ours, theirs = pair(make)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager" if make is network else "eager")
    torch.testing.assert_close(compiled(data()), theirs(data()))
    change(ours, monkeypatch), change(theirs, monkeypatch)
    torch.testing.assert_close(compiled(data()), theirs(data()))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), bnfast.BatchRenorm2d])
def test_network(norm: Callable[[int], nn.Module]) -> None:
    theirs = bnfast.convert(network(norm))
    ours = bnfast.fuse(copy.deepcopy(theirs))
    report = bnfast.fusion_report(ours)
    assert (len(report.fused), sum(f.residual for f in report.fused)) == (5, 2)
    assert report.skipped == (("2.downsample.1", "it is the residual of bn2"),)
    assert_same_training(record(ours, data()), record(theirs, data()))


class Optional(nn.Module):
    """A forward with an argument that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return torch.relu(y) if skip is None else torch.relu(y + skip) * 2


class Required(Optional):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return F.relu(add_in_place(self.norm(x), skip))


def test_a_residual_that_needs_broadcasting_or_casting(calls: list[tuple[str | None, bool]]) -> None:
    ours, theirs = pair(Required)
    for z in (data(1)[:, :, :1], data(1).float(), data(1)):
        torch.testing.assert_close(ours(data(), z), theirs(data(), z))
    assert calls == [(None, False), (None, False), ("relu", True)]


def test_other_arguments_take_the_original_forward() -> None:
    ours, theirs = pair(Optional)
    assert fused_count(ours) == 1
    for args, kwargs in (((data(),), {}), ((data(), data(1)), {}), ((), {"x": data()}), ((data(), None), {})):
        torch.testing.assert_close(ours(*args, **kwargs), theirs(*args, **kwargs))


class Kept(dict):  # type: ignore[type-arg]
    """Not known to torch.fx."""


@pytest.mark.parametrize(("kind", "fused"), [(dict, 1), (collections.OrderedDict, 1), (Kept, 0)])
def test_outputs_stay_of_their_kind(kind: type, fused: int) -> None:
    ours, theirs = pair(tail(lambda b, y, x: kind(out=F.relu(y), input=x)))
    assert fused_count(ours) == fused
    assert_same_training(record(ours, data()), record(theirs, data()))
    output = ours(data())
    assert type(output) is kind
    assert list(output) == ["out", "input"]


def _dropout(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.dropout(F.relu(y), 0.0, b.training)


def _branch(b: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * 2 if b.training else F.silu(y + x)


def _only_in_inference(b: Any, y: Tensor, x: Tensor) -> Tensor:
    if b.training:
        b.last = y
    return F.relu(y)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("fused_in", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("function", "sites"), [(_dropout, (1, 1)), (_branch, (1, 1)), (_only_in_inference, (0, 1))]
)
def test_both_modes_are_fused(function: Callable[..., Any], sites: tuple[int, int], fused_in: bool) -> None:
    ours, theirs = pair(lambda: tail(function)().train(fused_in))
    for training in (True, False, True):
        assert fused_count(ours.train(training)) == sites[not training]
        torch.testing.assert_close(ours(data()), theirs.train(training)(data()))
    assert_same_training(record(ours, data()), record(theirs, data()))


def test_the_reason_is_that_of_the_mode() -> None:
    ours, _ = pair(tail(lambda b, y, x: F.relu(y) if b.training else F.relu(y) * b.factor, factor=2))
    ours.eval().factor = 3
    assert reason(ours) == "its block's factor has changed"


def test_blocks_alike_share_a_class() -> None:
    model = bnfast.fuse(nn.Sequential(Residual(), Residual(), Residual(shortcut=True)))
    assert type(model[0]) is type(model[1]) is not type(model[2])
    assert type(pair(changed_forms.Derived)[0]) is type(pair(changed_forms.Derived)[0])
