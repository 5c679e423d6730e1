"""The benchmarks themselves: how they train, judge, time and print. See test_suites.py for the networks."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfast
from benchmarks import LAYERS, agreement, digits, kernels_in_training, normalizers, plots, report

pytestmark = pytest.mark.slow

SMALL = digits.Recipe(epochs=1, batch=8, width=4, steps=3)


@pytest.fixture(scope="module")
def images() -> digits.Digits:
    return digits.load(0, torch.device("cpu"))


def silent(loss: float) -> None:
    pass


# report


def test_table_aligns() -> None:
    assert report.table(["a", "bb"], [["xyz", "1"]]) == "a    bb\n---  --\nxyz   1"


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [report.new_folder(tmp_path / "deep") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() for folder in folders)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", folder.name) for folder in folders)


def test_losses_are_drawn(tmp_path: Path) -> None:
    curves = {"fp32": ([2.0, 1.0], [2.0, 1.1]), "fp64": ([2.0, 1.0], [2.0, 1.0])}
    plots.losses(tmp_path / "a.png", curves, ("theirs", "ours"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# training and its judgement


def test_training_repeats_itself_and_learns(images: digits.Digits) -> None:
    recipe = dataclasses.replace(SMALL, batch=64, width=8, epochs=2, steps=None)
    first, second = (digits.train(nn.BatchNorm2d, images, recipe, silent) for _ in range(2))
    assert first.losses == second.losses
    assert len(first.losses) == 2 * (1438 // 64)
    assert first.accuracy > 0.8
    assert agreement.compare(first, second).beyond(agreement.Limits(0, 0, 0, 0, 0, 0)) == []


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
    images: digits.Digits, wrong: type[nn.BatchNorm2d], named: str
) -> None:
    right, run = (digits.train(norm, images, SMALL, silent) for norm in (nn.BatchNorm2d, wrong))
    found = agreement.compare(right, run).beyond(agreement.FEW_STEPS)
    assert any(fault.startswith(named) for fault in found)


@pytest.mark.parametrize("dtype", agreement.FULL)
def test_a_wrong_layer_is_found_in_the_whole_training(images: digits.Digits, dtype: torch.dtype) -> None:
    recipe = dataclasses.replace(SMALL, dtype=dtype)
    right, wrong = (digits.train(norm, images, recipe, silent) for norm in (nn.BatchNorm2d, Biased))
    assert agreement.compare(right, wrong).beyond(agreement.FULL[dtype])


@pytest.mark.parametrize("place", ["losses", "parameters", "buffers", "gradients"])
def test_nan_is_within_no_limit(images: digits.Digits, place: str) -> None:
    right = digits.train(nn.BatchNorm2d, images, dataclasses.replace(SMALL, steps=1), silent)
    wrong = copy.deepcopy(right)
    if place == "losses":
        wrong.losses[0] = float("nan")
    else:
        next(t for t in getattr(wrong, place).values() if t.is_floating_point()).view(-1)[0] = float("nan")
    faults = agreement.compare(right, wrong).beyond(agreement.FEW_STEPS)
    assert any(fault.startswith(place) for fault in faults)


def test_other_networks_cannot_be_compared(images: digits.Digits) -> None:
    one, other = (
        digits.train(nn.BatchNorm2d, images, dataclasses.replace(SMALL, steps=1, width=width), silent)
        for width in (4, 5)
    )
    with pytest.raises(ValueError, match="same parameters"):
        agreement.compare(one, other)


def test_kernels_that_were_not_launched_are_a_fault() -> None:
    same = agreement.Agreement(0, 0, 0, 0, 0, 0)
    outcome = kernels_in_training.Outcome(3, 8, [1.0], [1.0], same, launches=117, expected_launches=117)
    assert outcome.faults() == []
    assert "0 kernels" in dataclasses.replace(outcome, launches=0).faults()[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_kernels_train_in_a_process_of_their_own(layer: str) -> None:
    """Nine layers. Held cells, and rows, take one launch forward and two backward; channels two and two."""
    found = kernels_in_training.check(layer, steps=1, batch=2, width=4)
    assert found.faults() == []
    assert found.launches == 9 * (5 if layer.startswith("Batch") else 4)


# the layers to train with


@pytest.mark.parametrize("layer", LAYERS)
def test_pairs_are_of_torch_and_of_bnfast(layer: str) -> None:
    pair = normalizers.pair(layer, 12)
    theirs, ours = ({type(m).__module__ for m in make(8).modules()} for make in (pair.theirs, pair.ours))
    assert any(module.startswith("bnfast.") for module in ours)
    assert not any(module.startswith("bnfast") for module in theirs)
    assert pair.theirs(8).state_dict().keys() == pair.ours(8).state_dict().keys()


def test_another_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer 'BatchNorm3d'.*LayerNorm"):
        normalizers.pair("BatchNorm3d", 12)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_batch_renorm_is_algorithm_1_and_its_limits_act(images: digits.Digits, path: str) -> None:
    recipe = dataclasses.replace(SMALL, steps=8, dtype=torch.float64)
    pair = normalizers.pair("BatchRenorm", 8)
    plain, ours, batch = (
        digits.train(norm, images, recipe, silent) for norm in (pair.theirs, pair.ours, nn.BatchNorm2d)
    )
    assert agreement.compare(plain, ours).beyond(agreement.FULL[torch.float64]) == []
    assert plain.losses[:2] == pytest.approx(batch.losses[:2], abs=1e-12)  # r = 1 and d = 0
    unlimited = dataclasses.replace(normalizers.schedule(8), r_max=100.0, d_max=100.0)
    other = digits.train(lambda c: bnfast.BatchRenorm2d(c, **vars(unlimited)), images, recipe, silent)
    for run in (batch, other):
        assert abs(run.losses[-1] - plain.losses[-1]) > 1e-3


def test_layer_norm_is_over_channels() -> None:
    y = normalizers.pair("LayerNorm", 1).theirs(32)(torch.randn(2, 32, 3, 5) + 1)
    assert y.shape == (2, 32, 3, 5)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 5), atol=1e-5, rtol=0)


def test_networks_without_buffers_can_be_compared(images: digits.Digits) -> None:
    one, other = (digits.train(norm, images, SMALL, silent) for norm in (nn.Identity, nn.Identity))
    apart = agreement.compare(one, other)
    assert apart.buffers is None
    assert apart.beyond(agreement.Limits(0, 0, 0, 0, 0, 0)) == []
