"""The digits: how they are trained, and what is said of two runs that do not agree."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import LAYERS, digits, session
from benchmarks.digits import LIMITS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
train = functools.partial(digits.train, device=CPU, batch=8, width=4, steps=3)


def test_training_repeats_itself_and_learns() -> None:
    first, second = (digits.train(nn.BatchNorm2d, CPU, epochs=2) for _ in range(2))
    assert len(first.losses) == 2 * (1438 // 64)
    assert first.accuracy > 0.8
    assert (digits.compare(first, second, "fp64")["found"] == 0).all()


def wrong(first: digits.Run, second: digits.Run, limits: str) -> list[str]:
    table = digits.compare(first, second, limits)
    return [*table["largest difference"][table["wrong"]]]


class Biased(nn.BatchNorm2d):
    """A layer that is wrong in the fourth digit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.001


class Forgetful(nn.BatchNorm2d):
    """A layer whose output is right and whose running statistics are not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.training and self.running_mean is not None:
            self.running_mean = self.running_mean * 0.9
        return y


@pytest.mark.parametrize(("layer", "limits", "named"), [
    (Biased, "kernels", "losses"), (Forgetful, "kernels", "buffers"), (Biased, "fp32", "gradients"),
    (Biased, "fp64", "losses"), (Forgetful, "fp64", "buffers"),
])  # fmt: skip
def test_a_wrong_layer_is_found(layer: type[nn.BatchNorm2d], limits: str, named: str) -> None:
    dtype = torch.float64 if limits == "fp64" else torch.float32
    assert named in wrong(train(nn.BatchNorm2d, dtype=dtype), train(layer, dtype=dtype), limits)


@pytest.mark.parametrize("place", LIMITS["kernels"])
def test_nan_is_within_no_limit(place: str) -> None:
    right = train(nn.BatchNorm2d, steps=1)
    other = copy.deepcopy(right)
    if place == "losses":
        other.losses[0] = float("nan")
    else:
        next(t for t in getattr(other, place).values() if t.is_floating_point()).view(-1)[0] = float("nan")
    assert wrong(right, other, "kernels") == [place]


# the kernels


@pytest.mark.parametrize("layer", LAYERS)
def test_the_kernels_train_in_a_process_of_their_own(layer: str) -> None:
    """Six layers. One-pass groups and rows take one launch forward and two backward; channels two and two."""
    theirs, ours, launches, calls = digits.kernel_steps(layer, steps=1, batch=2, width=4)
    assert wrong(theirs, ours, "kernels") == []
    assert (launches, calls) == (6 * (5 if layer == "BatchNorm" else 4), 6 * 3)


def test_kernels_that_were_not_launched_or_are_wrong_fail_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look = session.Session(tmp_path, CPU, ["matplotlib"])
    monkeypatch.setattr(session.Session, "why_plain_torch", lambda self: "a test")
    right, other = (train(norm, width=8) for norm in (nn.BatchNorm2d, Biased))
    for found in ((right, right, 9, 9), (right, right, 0, 9), (right, other, 9, 9)):
        monkeypatch.setattr(digits, "kernel_steps", lambda layer, found=found: found)
        digits.train_with_kernels(look, "BatchNorm")
    monkeypatch.setattr(digits, "kernel_steps", lambda layer: 1 / 0)
    digits.train_with_kernels(look, "BatchNorm")
    states, texts = zip(*((state, text) for _, state, text in look.summary), strict=True)
    assert states == ("PASS", "FAIL", "FAIL", "FAIL")
    assert "0 launches in 9 calls" in texts[1]
    assert "beyond the limits: kernels losses" in texts[2]
    assert "ZeroDivisionError" in texts[3]


# the layers to train with


@pytest.mark.parametrize("layer", LAYERS)
def test_pairs_are_of_torch_and_of_bnfast(layer: str) -> None:
    theirs, ours = (make(8) for make in digits.pair(layer))
    assert any(type(m).__module__.startswith("bnfast.") for m in ours.modules())
    assert not any(type(m).__module__.startswith("bnfast.") for m in theirs.modules())
    assert theirs.state_dict().keys() == ours.state_dict().keys()
