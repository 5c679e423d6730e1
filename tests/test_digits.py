"""The digits: how they are trained, and what is said of two runs that do not agree."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import bnfast
from benchmarks import LAYERS, digits

pytestmark = pytest.mark.slow

SMALL = digits.Recipe(epochs=1, batch=8, width=4, steps=3)
Examples = tuple[torch.Tensor, torch.Tensor]
ALIKE = dict.fromkeys(("losses", "gradients", "parameters", "buffers", "accuracy"), 0.0)


@pytest.fixture(scope="module")
def images() -> Examples:
    return digits.load(0, torch.device("cpu"))


def test_training_repeats_itself_and_learns(images: Examples) -> None:
    recipe = dataclasses.replace(SMALL, batch=64, width=8, epochs=2, steps=None)
    first, second = (digits.train(nn.BatchNorm2d, images, recipe) for _ in range(2))
    assert first.losses == second.losses
    assert len(first.losses) == 2 * (1438 // 64)
    assert first.accuracy > 0.8
    assert digits.beyond(digits.compare(first, second), ALIKE) == []


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


@pytest.mark.parametrize(("wrong", "named"), [(Biased, "losses"), (Forgetful, "buffers")])
def test_a_wrong_layer_is_found_in_a_few_steps(
    images: Examples, wrong: type[nn.BatchNorm2d], named: str
) -> None:
    right, run = (digits.train(norm, images, SMALL) for norm in (nn.BatchNorm2d, wrong))
    found = digits.beyond(digits.compare(right, run), digits.FEW_STEPS)
    assert any(fault.startswith(named) for fault in found)


@pytest.mark.parametrize("dtype", digits.FULL)
def test_a_wrong_layer_is_found_in_the_whole_training(images: Examples, dtype: torch.dtype) -> None:
    recipe = dataclasses.replace(SMALL, dtype=dtype)
    right, wrong = (digits.train(norm, images, recipe) for norm in (nn.BatchNorm2d, Biased))
    assert digits.beyond(digits.compare(right, wrong), digits.FULL[dtype])


@pytest.mark.parametrize("place", ["losses", "parameters", "buffers", "gradients"])
def test_nan_is_within_no_limit(images: Examples, place: str) -> None:
    right = digits.train(nn.BatchNorm2d, images, dataclasses.replace(SMALL, steps=1))
    wrong = copy.deepcopy(right)
    if place == "losses":
        wrong.losses[0] = float("nan")
    else:
        next(t for t in getattr(wrong, place).values() if t.is_floating_point()).view(-1)[0] = float("nan")
    faults = digits.beyond(digits.compare(right, wrong), digits.FEW_STEPS)
    assert any(fault.startswith(place) for fault in faults)


def test_other_networks_cannot_be_compared(images: Examples) -> None:
    one, other = (
        digits.train(nn.BatchNorm2d, images, dataclasses.replace(SMALL, steps=1, width=width))
        for width in (4, 5)
    )
    with pytest.raises(ValueError, match="same parameters"):
        digits.compare(one, other)


def test_kernels_that_were_not_launched_are_a_fault() -> None:
    found = {"apart": dict.fromkeys(digits.FEW_STEPS, 0.0), "launches": 63, "calls": 63}
    assert digits.kernel_faults(found) == []
    assert "0 kernels" in digits.kernel_faults({**found, "launches": 0})[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_kernels_train_in_a_process_of_their_own(layer: str) -> None:
    """Nine layers. Held cells, and rows, take one launch forward and two backward; channels two and two."""
    found = digits.kernel_steps(layer, steps=1, batch=2, width=4)
    assert digits.kernel_faults(found) == []
    assert found["launches"] == 9 * (5 if layer.startswith("Batch") else 4)
    assert found["calls"] == 9 * 3


# the layers to train with


@pytest.mark.parametrize("layer", LAYERS)
def test_pairs_are_of_torch_and_of_bnfast(layer: str) -> None:
    theirs, ours = (make(8) for make in digits.pair(layer, 12))
    assert any(type(m).__module__.startswith("bnfast.") for m in ours.modules())
    assert not any(type(m).__module__.startswith("bnfast.") for m in theirs.modules())
    assert theirs.state_dict().keys() == ours.state_dict().keys()


def test_another_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer 'BatchNorm3d'.*LayerNorm"):
        digits.pair("BatchNorm3d", 12)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_batch_renorm_is_algorithm_1_and_its_limits_act(images: Examples, path: str) -> None:
    recipe = dataclasses.replace(SMALL, steps=8, dtype=torch.float64)
    norms = (*digits.pair("BatchRenorm", 8), nn.BatchNorm2d)
    plain, ours, batch = (digits.train(norm, images, recipe) for norm in norms)
    assert digits.beyond(digits.compare(plain, ours), digits.FULL[torch.float64]) == []
    assert plain.losses[:2] == pytest.approx(batch.losses[:2], abs=1e-12)  # r = 1 and d = 0
    unlimited = digits.schedule(8) | {"r_max": 100.0, "d_max": 100.0}
    other = digits.train(lambda c: bnfast.BatchRenorm2d(c, **unlimited), images, recipe)
    for run in (batch, other):
        assert abs(run.losses[-1] - plain.losses[-1]) > 1e-3


def test_layer_norm_is_over_channels() -> None:
    y = digits.pair("LayerNorm", 1)[0](32)(torch.randn(2, 32, 3, 5) + 1)
    assert y.shape == (2, 32, 3, 5)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 5), atol=1e-5, rtol=0)


def test_networks_without_buffers_can_be_compared(images: Examples) -> None:
    one, other = (digits.train(norm, images, SMALL) for norm in (nn.Identity, nn.Identity))
    apart = digits.compare(one, other)
    assert "buffers" not in apart
    assert digits.beyond(apart, ALIKE) == []
