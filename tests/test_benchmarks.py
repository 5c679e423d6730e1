"""The benchmarks themselves: what they count, how they judge, time and print."""

from __future__ import annotations

import copy
import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import agreement, digits, kernels_in_training, measure, plots, report, resnet50
from benchmarks.resnet50 import Shape

SMALL = digits.Recipe(epochs=1, batch=8, width=4, steps=3)


@pytest.fixture(scope="module")
def images() -> digits.Digits:
    return digits.load(0, torch.device("cpu"))


def silent(loss: float) -> None:
    pass


# ResNet-50


def test_resnet50_has_the_known_layers() -> None:
    found = Counter(resnet50.layers())
    assert sum(found.values()) == 53
    assert len(found) == 12
    assert found[Shape(64, 112)] == 1
    assert found[Shape(256, 56)] == 4  # three blocks and one way round
    assert found[Shape(256, 14)] == 11
    assert found[Shape(2048, 7)] == 4
    assert sum(shape.bytes(256, 2) for shape in found.elements()) == 5_690_359_808


def test_counted_bytes_are_the_sweeps_and_little_more() -> None:
    for row in resnet50.rows(256, 2, channels_last=True):
        assert 3 * row.x_bytes <= row.forward_bytes <= 3.06 * row.x_bytes
        assert 5 * row.x_bytes <= row.backward_bytes <= 5.1 * row.x_bytes
        assert (row.forward_launches, row.backward_launches) == (2, 2)


def test_floor() -> None:
    assert resnet50.floor(4_300_000) == pytest.approx(1.0)


def measured_rows() -> list[resnet50.Row]:
    slow, fast = measure.Times(1234.5, 23456.7, "Native"), measure.Times(1000.0, 2000.0, "bnfast")
    return [dataclasses.replace(row, bnfast=fast, torch=slow) for row in resnet50.rows(256, 2, True)]


@pytest.mark.parametrize("gpu", [True, False])
def test_tables_fit_a_terminal(gpu: bool) -> None:
    rows = measured_rows() if gpu else resnet50.rows(256, 2, channels_last=True)
    absent = "-" if gpu else report.NEEDS_GPU
    text = report.table(
        resnet50.HEADERS, [*(resnet50.cells(row, absent) for row in rows), resnet50.total(rows, absent)]
    )
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert len(text.splitlines()) == 2 + 12 + 1
    assert text.count(report.NEEDS_GPU) == (0 if gpu else 26)
    speeds = report.table(resnet50.SPEED_HEADERS, [resnet50.speed(row) for row in rows])
    assert max(map(len, speeds.splitlines())) <= report.WIDTH


def test_total_of_measured_times() -> None:
    last = resnet50.total(measured_rows(), "-")
    assert last[-2:] == ["53000/106000", "65428/1243205"]
    unmeasured = [*measured_rows()[1:], resnet50.rows(256, 2, True)[0]]
    assert resnet50.total(unmeasured, "-")[-2:] == ["-", "-"]


def test_csv_of_resnet50(tmp_path: Path) -> None:
    rows = [*resnet50.rows(256, 2, True), measured_rows()[0]]
    lines = [resnet50.csv_row(row, 256, "bf16", "channels_last", report.NEEDS_GPU) for row in rows]
    report.write_csv(tmp_path / "t.csv", resnet50.CSV_HEADERS, lines)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 13
    assert {line["bnfast_forward_us"] for line in read[:12]} == {report.NEEDS_GPU}
    assert (read[0]["channels"], read[0]["layers"], read[0]["x_bytes"]) == ("64", "1", "411041792")
    assert (read[12]["bnfast_forward_us"], read[12]["torch_backend"]) == ("1000.0", "Native")
    rate = int(read[12]["forward_bytes"]) / 1000 / 1e3  # bytes, microseconds
    assert float(read[12]["bnfast_forward_GBps"]) == pytest.approx(rate, rel=1e-3)


# report


def test_table_aligns() -> None:
    assert report.table(["a", "bb"], [["xyz", "1"]]) == "a    bb\n---  --\nxyz   1"


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [report.new_folder(tmp_path / "deep") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() for folder in folders)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", folder.name) for folder in folders)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    plots.losses(tmp_path / "a.png", {"fp32": ([2.0, 1.0], [2.0, 1.1]), "fp64": ([2.0, 1.0], [2.0, 1.0])})
    plots.resnet(tmp_path / "b.png", measured_rows(), "title")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


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


def test_the_kernels_train_in_a_process_of_their_own() -> None:
    found = kernels_in_training.check(steps=1, batch=2, width=4)
    assert found.faults() == []
    assert found.launches == 9 * 5  # layers, each two forward, two backward and one in eval


# measuring


class Clock:
    """A clock that only work moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, microseconds: float) -> None:
        self.now += microseconds

    def stopwatch(self, work: Callable[[], None]) -> float:
        start = self.now
        work()
        return self.now - start


def test_calls_are_timed_and_their_preparation_is_not() -> None:
    clock = Clock()
    calls = [partial(clock.work, 10), partial(clock.work, 20)]
    assert measure.median_per_call(calls, partial(clock.work, 7), clock.stopwatch, rounds=3) == 15


def test_warming_up_is_left_out_and_an_outlier_outvoted() -> None:
    clock, times = Clock(), iter([900.0, 900.0, 10.0, 500.0, 12.0])
    assert measure.median_per_call([lambda: clock.work(next(times))], lambda: None, clock.stopwatch, 3) == 12


def test_forward_and_backward_of_a_layer_are_timed_apart() -> None:
    clock = Clock()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            clock.work(5)
            return x * weight

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            clock.work(20)
            return dy, dy.sum()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Slow.apply(x, self.weight)

    inputs = [torch.randn(4, requires_grad=True) for _ in range(2)]
    times = measure.layer(Layer(), inputs, [torch.ones(4)] * 2, clock.stopwatch, rounds=3)
    assert times == (5, 20)


def test_a_rotation_is_cold_when_it_comes_round() -> None:
    for size in (1, 10**6, 10**8, 10**9):
        assert (measure.rotation(size) - 1) * size >= measure.COLD_BYTES
    assert measure.rotation(10**9) == 2


def test_backend_names_who_computes() -> None:
    assert measure.backend(nn.BatchNorm2d(4), torch.randn(2, 4, 3, 3)) == "Native"
