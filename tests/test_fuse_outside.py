"""What a forward reads that is neither its input nor on its block: a change of it brings the original forward
back, and where a change could not be seen the block is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bnfast
from tests.support import outside
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
