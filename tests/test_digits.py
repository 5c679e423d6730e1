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
    assert first.accuracy > 0.7
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
        next(t for t in other.tensors[place].values() if t.is_floating_point()).view(-1)[0] = float("nan")
    assert wrong(right, other, "kernels") == [place]


@pytest.mark.compiled
@pytest.mark.usefixtures("executed")
@pytest.mark.parametrize("layer", LAYERS)
def test_the_compiled_kernels_train(layer: str) -> None:
    """Five layers. One-pass groups and rows take one launch forward, two backward; channels one and one, and
    one in eval."""
    theirs, ours, launches, calls = digits.kernel_steps(layer, steps=1, batch=2)
    assert wrong(theirs, ours, "kernels") == []
    assert (launches, calls) == (5 * (3 if layer == "BatchNorm" else 4), 5 * 3)
    libraries = [type(make(8)).__module__.partition(".")[0] for make in digits.PAIRS[layer]]
    assert libraries == ["torch", "bnfast"]


RIGHT, OTHER = functools.partial(train, nn.BatchNorm2d), functools.partial(train, Biased)


@pytest.mark.parametrize(("other", "launches", "state", "text"), [
    (RIGHT, 9, "PASS", "9 launches in 9 calls"), (RIGHT, 0, "FAIL", "0 launches in 9 calls"),
    (OTHER, 9, "FAIL", "beyond the limits: kernels losses"), (lambda: 1 / 0, 9, "FAIL", "ZeroDivisionError"),
])  # fmt: skip
def test_kernels_that_were_not_launched_or_are_wrong_fail_the_job(
    other: functools.partial[digits.Run], launches: int, state: str, text: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    look = session.Session(tmp_path, CPU, ["matplotlib"])
    monkeypatch.setattr(session.Session, "why_plain_torch", lambda self: "a test")
    monkeypatch.setattr(digits, "kernel_steps", lambda layer: (RIGHT(), other(), launches, 9))
    digits.train_with_kernels(look, "BatchNorm")
    ((part, found, said),) = look.summary
    assert (part, found) == ("kernels", state)
    assert text in said
