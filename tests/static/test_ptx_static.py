"""Layers whose compiled PTX is executed: they compute what they should, and what is broken is found."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bnfast
from bnfast import selfcheck
from bnfast.checks import one_step
from bnfast.checks.cases import Case, batch_renorm, given, group_norm
from bnfast.checks.fp64 import judge
from bnfast.kernels.normalizers.group_norm import finalize_groups
from bnfast.ptx import Execution, execute, executing
from bnfast.ptx.execute import Fault
from bnfast.ptx.program import Program, UnknownInstruction
from codegen.launches import TABLES
from tests.support.buffers import assert_same_bits

pytestmark = [pytest.mark.static, pytest.mark.usefixtures("executor")]

SCHEDULES = (1, 2, 3)
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
PLANNED = [
    *(Case(shape, BF16, True) for shape in ((4, 64, 56, 56), (2, 257, 3, 3), (1, 1, 9, 9), (7, 1000, 1, 1))),
    *(Case(shape, FP32, True, mean=1e4) for shape in ((2, 72, 17, 19), (1, 13, 5, 7), (3, 5, 2, 3, 4))),
    batch_renorm((4, 24, 7, 7), FP32, True),
    group_norm((2, 320, 16, 16), FP16, True, groups=32),
]


def stepped(seed: int) -> tuple[list[Execution], dict[str, Tensor]]:
    """A training step of a layer, and its results. With two_launches, several programs share a channel."""
    x = torch.randn(8, 64, 14, 14, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = bnfast.BatchNorm2d(64, activation="relu")
    with executing(sms=4, seeds=(seed,)) as executed:
        y = layer(x)
        y.backward(torch.ones_like(x))
    assert x.grad is not None
    return executed, {"y": y.detach(), "dx": x.grad, **layer.state_dict()}


def trained(seed: int) -> list[Execution]:
    return stepped(seed)[0]


def no_barrier_before(text: str) -> str:
    """Between the partial results' stores and the atomic."""
    start, atomic, rest = text.partition("atom.global")
    lines = start.splitlines(keepends=True)
    last_store = max(n for n, line in enumerate(lines) if "st.global" in line)
    return (
        "".join(lines[:last_store] + [x for x in lines[last_store:] if "bar.sync" not in x]) + atomic + rest
    )


def no_barrier_after(text: str) -> str:
    start, atomic, rest = text.partition("atom.global")
    return start + atomic + rest.replace("bar.sync", "// bar.sync", 1)


def relaxed(text: str) -> str:
    return text.replace("gpu.acq_rel.add", "gpu.relaxed.add")


def no_reset(text: str) -> str:
    return re.sub(r"@%p\d+ st\.global\.b32 \[ %rd\d+ \+ 0 \], \{ %r\d+ \};", "", text)


def no_mask(text: str) -> str:
    return re.sub(r"@%p\d+ (st\.global\S*\.v4\.b32)", r"\1", text)


BROKEN: dict[Callable[[str], str], str] = {
    no_barrier_before: "race in",
    no_barrier_after: "race in shared memory|uninitialized",
    relaxed: "race in global memory",
    no_reset: "leaves counts in its semaphores",
    no_mask: "out of bounds",
}


@pytest.fixture
def programs() -> Iterator[dict[str, Program]]:
    """The programs that are known, forgotten before and after."""
    execute._programs.clear()
    yield execute._programs
    execute._programs.clear()


@pytest.mark.usefixtures("two_launches")
@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_what_is_broken_is_found_in_every_schedule(
    change: Callable[[str], str], programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only kernels with an atomic are changed where the change is one around it."""

    def changed(text: str) -> Program:
        return Program(change(text) if "atom" in text or change is no_mask else text)

    monkeypatch.setattr(execute, "Program", changed)
    for seed in SCHEDULES:
        with pytest.raises(Fault, match=BROKEN[change]):
            trained(seed)


@pytest.mark.usefixtures("two_launches")
@pytest.mark.parametrize("kernel", ["statistics_kernel", "gradient_sums_kernel"])
def test_a_barrier_less_is_found_unless_it_changes_nothing(
    kernel: str, programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton sets some that nothing needs, two in a row for example, and some for warps that all hold what
    they exchange."""
    texts: list[str] = []
    monkeypatch.setattr(execute, "Program", lambda text: texts.append(text) or Program(text))
    _, right = stepped(1)
    (text,) = (text for text in texts if f".entry {kernel}" in text)
    barriers = [found.start() for found in re.finditer(r"bar\.sync", text)]
    assert len(barriers) > 20
    faults = 0
    for place in barriers:
        broken = Program(f"{text[:place]}// {text[place:]}")
        monkeypatch.setattr(execute, "Program", lambda each, b=broken: b if each == text else Program(each))
        for seed in SCHEDULES:
            programs.clear()
            try:
                assert_same_bits(stepped(seed)[1], right)
            except Fault:
                faults += 1
    assert faults > 0.6 * len(SCHEDULES) * len(barriers)


def test_the_barrier_before_partial_results_are_overwritten(
    programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of GroupNorm's merge, between warps in global memory. It is found by its place in the source."""
    lines = inspect.getsource(sys.modules[finalize_groups.fn.__module__]).splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if "slot 0" in line)
    removed = []

    def without(text: str) -> Program:
        place = rf"(// group_norm\.py:{number}:[^\n]*\n(?:[^\n]*\.loc[^\n]*\n|\$L[^\n]*\n)*\s*)bar\.sync"
        text, n = re.subn(place, r"\1// bar.sync", text)
        removed.append(n)
        return Program(text)

    x = torch.randn(2, 320, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(execute, "Program", without)
    for seed in SCHEDULES:
        with executing(sms=4, seeds=(seed,)), pytest.raises(Fault, match="with another warp"):
            bnfast.GroupNorm(32, 320)(x)
    assert sum(removed) == 1


@pytest.mark.usefixtures("two_launches")
def test_every_schedule_gives_the_same_and_no_fault() -> None:
    def counts(launch: Execution) -> tuple[object, ...]:
        """The table of statistics is loaded by several programs at a time."""
        moved = {name: t.moved.tolist() for name, t in launch.tensors.items() if name not in TABLES}
        return (
            launch.count("sectors"),
            moved,
            {name: t.touched.tolist() for name, t in launch.tensors.items()},
        )

    found = [[counts(launch) for launch in trained(seed)] for seed in SCHEDULES]
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("two_launches")
@pytest.mark.parametrize(("again", "reads", "writes"), [("no", 2, 1), ("ld", 4, 1), ("st", 2, 2)])
def test_what_is_moved_again_is_counted(
    again: str, reads: int, writes: int, programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeated(text: str) -> Program:
        return Program(re.sub(rf"^(.*{again}\.global.*;)$", r"\1\n\1", text, flags=re.MULTILINE))

    monkeypatch.setattr(execute, "Program", repeated)
    for seed in SCHEDULES:
        statistics, transform, *_ = (launch.tensors for launch in trained(seed))
        assert statistics["x_ptr"].reads + transform["x_ptr"].reads == reads
        assert transform["y_ptr"].writes == writes


def test_approximate_results_may_be_anywhere_within_their_error() -> None:
    x = torch.linspace(-4, 4, 512).reshape(4, 128)
    layer = bnfast.LayerNorm(128, activation="silu")
    results = []
    for perturb in (0, 1, 2):
        with executing(perturb=perturb):
            results.append(layer(x).detach())
    assert not torch.equal(results[1], results[2])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("case", PLANNED, ids=str)
def test_a_layer_as_planned_for_an_h200(case: Case) -> None:
    """Small tensors, whose channels_last ones are reduced by few programs. Other tests plan for few SMs."""
    tensors = given(case, torch.device("cpu"))
    with executing(sms=132, seeds=SCHEDULES):
        found = one_step.run(case, bnfast, tensors)
    bad = {name: verdict for name, verdict in judge(case, tensors, found).items() if not verdict.ok}
    assert not bad


def test_a_user_can_check_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.run(1.0, compiled=True) == 0
    text = capsys.readouterr().out
    assert "executes their compiled PTX" in text
    assert " 0 failed" in text


@pytest.mark.parametrize("error", [Fault, UnknownInstruction], ids=lambda error: error.__name__)
def test_what_a_check_finds_ends_its_case_alone(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = selfcheck.cases(torch.device("cpu"))[:2]
    sound = one_step.run

    def run(case: Any, library: Any, tensors: Any) -> Any:
        if case is first:
            raise error("a race in statistics_kernel\nand where it is")
        return sound(case, library, tensors)

    monkeypatch.setattr(selfcheck, "cases", lambda device: [first, second])
    monkeypatch.setattr(one_step, "run", run)
    assert selfcheck.run(60.0, compiled=True) == 1
    text = capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if line.startswith("FAIL"))
    assert line.split()[1] == first.layer
    assert line.endswith(" a race in statistics_kernel")
    assert "and where it is" not in text
    assert "1 passed, 1 failed" in text
