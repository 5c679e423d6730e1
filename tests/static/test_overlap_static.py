"""Launches of one call that overlap (BNFAST_PDL=1): they are those that were meant, give the same bits, and
wait for each other before they touch anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnfast
from bnfast.kernels import launch, launch_plan
from bnfast.ptx import Execution, execute, executing
from bnfast.ptx.driver import as_on_a_gpu
from bnfast.ptx.execute import Fault
from bnfast.ptx.program import Program
from tests.support.buffers import assert_same_bits

pytestmark = [pytest.mark.static, pytest.mark.usefixtures("two_launches")]

SCHEDULES = (1, 2, 3)


class Step(NamedTuple):
    """A layer's training step. dependent: the launches that start before those before them have ended."""

    layer: nn.Module
    shape: Sequence[int]
    dependent: Sequence[str]
    channels_last: bool = False

    def run(self, seeds: Sequence[int] = SCHEDULES) -> tuple[list[Execution], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(*self.shape, generator=generator) for _ in range(2))
        if self.channels_last:
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        x.requires_grad_()
        with executing(sms=4, seeds=seeds) as executed:
            y = self.layer(x)
            gradients = torch.autograd.grad(y, [x, *self.layer.parameters()], dy)
        return executed, {"y": y.detach(), **{str(k): t for k, t in enumerate(gradients)}}


STEPS = {
    "BatchNorm": Step(
        bnfast.BatchNorm2d(64, activation="relu"), (8, 64, 14, 14),
        ["transform_kernel", "gradient_transform_kernel"], True,
    ),
    "GroupNorm": Step(bnfast.GroupNorm(2, 8), (2, 8, 6, 8), ["column_sums_kernel"]),
    "GroupNorm, two passes": Step(
        bnfast.GroupNorm(8, 32), (2, 32, 16, 16),
        ["transform_kernel", "column_sums_kernel", "gradient_transform_kernel"], True,
    ),
    "LayerNorm": Step(bnfast.LayerNorm(64), (32, 64), ["column_sums_kernel"]),
    "LayerNorm, an activation": Step(
        bnfast.LayerNorm(64, activation="gelu"), (32, 64), ["row_gradients_kernel", "column_sums_kernel"]
    ),
    "LayerNorm, long rows": Step(
        bnfast.LayerNorm(20000), (3, 20000), ["wide_gradients_kernel", "column_sums_kernel"]
    ),
}  # fmt: skip


@pytest.fixture
def overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "OVERLAPS", True)


@pytest.fixture
def programs(executor: None) -> Iterator[None]:
    """The programs that are known, forgotten before and after."""
    execute._programs.clear()
    yield
    execute._programs.clear()


@pytest.mark.usefixtures("executor")
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_same_bits(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, without = step.run()
    assert not any(each.dependent for each in launched)
    monkeypatch.setattr(launch, "OVERLAPS", True)
    overlapping, results = step.run()
    assert [each.kernel for each in overlapping] == [each.kernel for each in launched]
    assert [each.kernel for each in overlapping if each.dependent] == step.dependent
    assert_same_bits(results, without)


def without_wait(text: str) -> str:
    return text.replace("griddepcontrol.wait", "// griddepcontrol.wait")


def late_wait(text: str) -> str:
    return re.sub(r"\bret;", "griddepcontrol.wait;\nret;", without_wait(text))


WAITING = [(step, kernel) for step in STEPS.values() for kernel in step.dependent]


@pytest.mark.usefixtures("overlaps", "programs")
@pytest.mark.parametrize("change", [without_wait, late_wait])
@pytest.mark.parametrize(
    ("step", "kernel"),
    WAITING,
    ids=[f"{name}-{kernel}" for name in STEPS for kernel in STEPS[name].dependent],
)
def test_a_wait_that_is_missing_is_found(
    step: Step, kernel: str, change: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every schedule, by the first load of what the launch before stores, or by the first store."""

    def changed(text: str) -> Program:
        return Program(change(text) if f".entry {kernel}" in text else text)  # type: ignore[operator]

    monkeypatch.setattr(execute, "Program", changed)
    for seed in SCHEDULES:
        with pytest.raises(Fault, match=rf"{kernel}.*\n(.*\n)*line \d+: a (load|store) before the wait"):
            step.run([seed])


@pytest.mark.parametrize(("target", "can"), [("sm_80", 0), ("sm_90", 1), ("sm_100", 1), ("gfx942", 0)])
@pytest.mark.parametrize("asked", [False, True])
def test_who_overlaps(target: str, can: int, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of compute capability 9.0 and up, if asked; elsewhere, no kernel has such an instruction."""
    monkeypatch.setattr(launch, "OVERLAPS", asked)
    x = torch.ones(2, 64, requires_grad=True)
    layer = bnfast.LayerNorm(64)
    with as_on_a_gpu(target) as driver:
        for _ in range(2):  # bound by the first, and made directly by the second
            torch.autograd.grad(layer(x).sum(), [x, layer.weight])
        assert driver.launches == 6
        compiled = {kernel.name: kernel for kernel in driver.compiled()}
        launches = [each for plan in launch_plan._plans.values() for each in plan.launches]
        overlapping = {each._kernel.__name__ for each in launches if each._options.get("launch_pdl")}
    expected = {"column_sums_kernel"} if asked and can else set()
    assert overlapping == expected
    assert {
        name for name, kernel in compiled.items() if getattr(kernel.metadata, "launch_pdl", 0)
    } == expected
    for part, kernel in (("wait", "column_sums_kernel"), ("launch_dependents", "row_gradients_kernel")):
        having = {
            name for name, each in compiled.items() if f"griddepcontrol.{part}" in str(each.asm.get("ptx"))
        }
        assert having == ({kernel} if asked and can else set())


@pytest.mark.parametrize(("value", "found"), [(None, False), ("0", False), ("", False), ("1", True)])
def test_the_variable(value: str | None, found: bool) -> None:
    variables = {name: each for name, each in os.environ.items() if name != "BNFAST_PDL"}
    if value is not None:
        variables["BNFAST_PDL"] = value
    code = "from bnfast.kernels import launch; print(launch.OVERLAPS)"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == str(found), done.stderr
