"""What is counted of a few programs, held against launches that are executed whole and machine code."""

from __future__ import annotations

import pytest
import torch

from bnfast.ptx import executing
from codegen import launches
from codegen.cases import BF16, CASES, Case, layers

pytestmark = [pytest.mark.static, pytest.mark.usefixtures("executor")]

SMALL = [
    *layers("BatchNorm", (8, 64, 14, 14), after=["relu"], last=(True, False)),
    *layers("BatchNorm", (64, 16, 8, 8), last=(True,)),
    *layers("GroupNorm", (2, 320, 32, 32), last=(True,), groups=32),
    *layers("GroupNorm", (3, 64, 72, 70), groups=2),
    *layers("LayerNorm", (96, 768)),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_few_programs_stand_for_their_launch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """All programs do about what they do, and the one that finalizes does what the last one does."""
    monkeypatch.setattr(launches, "SMS", 4)
    layer, x = launches.layer_of(case), case.tensor(torch.device("cpu"), 0).requires_grad_()
    with executing(sms=4) as executed:
        layer(x).backward(torch.ones_like(x))
    found = [each for several in launches.of_case(case).values() for each in several]
    assert [each.kernel for each in executed] == [each.kernel for each in found]
    for whole, one in zip(executed, found, strict=True):
        counts = one.counts
        assert whole.grid == one.programs
        assert whole.totals["barriers"] == counts.barriers + counts.final_barriers
        assert whole.totals["final_round_trips"] == counts.final_round_trips
        for counted, each in (("sectors", counts.sectors), ("wavefronts", counts.wavefronts)):
            assert whole.count(counted) == pytest.approx(each * whole.grid, rel=0.25, abs=16), whole.kernel


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == BF16], ids=str)
def test_instructions_are_about_those_of_machine_code(case: Case) -> None:
    """Of kernels without a loop, where each instruction of a warp is issued once."""
    for each in (each for several in launches.of_case(case).values() for each in several):
        if not each.report.code.phases.main_loop:
            text = len(each.report.code.instructions) * each.report.num_warps
            assert each.counts.instructions == pytest.approx(text, rel=0.25), each.kernel
