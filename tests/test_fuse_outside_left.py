"""Blocks that ask about symbols, or that read what no guard can follow, are left, with a reason."""

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

pytestmark = pytest.mark.usefixtures("plain_torch")
LEFT = outside_left.TYPES | outside_left.UNSEEN


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    make, words = LEFT[name]
    ours, theirs = pair(make)
    (skipped,) = bnfast.fusion_report(ours).skipped
    assert words in skipped.reason
    assert outside_left.LOG == []
    torch.testing.assert_close(ours(data()), theirs(data()))
    outside_left.LOG.clear()


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
