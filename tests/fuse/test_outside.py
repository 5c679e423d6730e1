"""What a forward reads that is neither its input nor on its block: a change of it brings the original forward
back, and where a change could not be seen the block is left."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfast
from tests.support import outside, outside_left
from tests.support.block_forms import CHANNELS
from tests.support.fused import data, fused_count, pair
from tests.support.outside import GUARDED, LEFT
from tests.support.training import assert_same_training, record
from tests.support.versions import TORCH

pytestmark = pytest.mark.usefixtures("plain_torch")


@pytest.fixture(autouse=True)
def _around_as_before() -> Any:
    yield
    outside.put_back()


@pytest.mark.parametrize("name", GUARDED)
def test_a_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, change = GUARDED[name]
    ours, theirs = pair(make)
    assert fused_count(ours) == 1
    torch.testing.assert_close(ours(data()), theirs(data()))
    change(monkeypatch)
    assert fused_count(ours) == 0
    (skipped,) = bnfast.fusion_report(ours).skipped
    assert skipped.reason.endswith("which its block reads, has changed")
    assert_same_training(record(ours, data()), record(theirs, data()))
    monkeypatch.undo()
    outside.put_back()
    assert fused_count(ours) == 1


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    make, words = LEFT[name]
    state = outside.TOTAL, list(outside.CALLS), outside.Base.K
    model = bnfast.fuse(make().double())
    (skipped,) = bnfast.fusion_report(model).skipped
    assert words in skipped.reason
    assert state == (outside.TOTAL, outside.CALLS, outside.Base.K)
    assert not hasattr(outside.Settings, "last")


SYMBOLS = outside_left.TYPES | outside_left.UNSEEN


@pytest.mark.parametrize("name", SYMBOLS)
def test_blocks_that_ask_about_symbols_are_left(name: str) -> None:
    """Or that read what no guard can follow."""
    make, words = SYMBOLS[name]
    ours, theirs = pair(make)
    (skipped,) = bnfast.fusion_report(ours).skipped
    assert words in skipped.reason
    assert outside_left.LOG == []
    torch.testing.assert_close(ours(data()), theirs(data()))
    outside_left.LOG.clear()


def test_only_what_runs_counts() -> None:
    """A branch that is not taken may read what could not be guarded."""
    ours, theirs = pair(outside.times(lambda: len(outside.ENVIRONMENT) if not outside.FLAG else 2))
    assert fused_count(ours) == 1
    torch.testing.assert_close(ours(data()), theirs(data()))


def test_blocks_alike_share_a_class() -> None:
    models = [bnfast.fuse(outside.Derived()) for _ in range(2)]
    assert type(models[0]) is type(models[1])


@pytest.mark.parametrize(
    "name",
    ["number", "nested", "function", "object", "attribute of a base", "closure", "default", "set", "partial"],
)
def test_compiles_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if TORCH < (2, 14) and name in ("attribute of a base", "default"):
        pytest.skip("2.11's Dynamo has no guards for what this reads")
    make, change = GUARDED[name]
    ours, theirs = pair(make)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(data()), theirs(data()))
    change(monkeypatch)
    torch.testing.assert_close(compiled(data()), theirs(data()))


@pytest.mark.parametrize("held", [False, True])
def test_the_sign_of_zero(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "SCALE", 0.0)
    make = outside_left.holds(0.0, lambda zero: zero) if held else outside.times(lambda: outside.SCALE)
    ours = pair(make)[0]
    assert fused_count(ours) == 1
    if held:
        ours.thing = -0.0
    else:
        monkeypatch.setattr(outside, "SCALE", -0.0)
    assert fused_count(ours) == 0


class OwnCall(nn.ReLU):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


def test_reasons_say_what_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bnfast.fuse(nn.Sequential(nn.BatchNorm2d(CHANNELS), OwnCall()))
    (skipped,) = bnfast.fusion_report(model).skipped
    assert skipped.reason == "OwnCall (1) has a __call__ or a _call_impl of its own"
    model = bnfast.fuse(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    call: Any = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args, **kwargs: call(self, *args, **kwargs))
    (skipped,) = bnfast.fusion_report(model).skipped
    assert skipped.reason == "torch.nn.Module's __call__ or _call_impl has been replaced"


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
