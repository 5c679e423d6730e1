"""python -m bnfast check: what it covers, and that it tells right from wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bnfast import selfcheck
from bnfast.checks import one_step
from bnfast.checks.cases import Case, batch_renorm, group_norm, instance_norm, layer_norm

SMALL = [
    Case((4, 3, 5, 5)),
    batch_renorm((4, 3, 5, 5)),
    group_norm((2, 4, 5, 5), groups=2),
    instance_norm((2, 3, 5, 5)),
    layer_norm((5, 9)),
]
every_layer = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.layer)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@every_layer
def test_every_layer_in_every_dtype_and_layout(case: Case, kind: str) -> None:
    found = [other for other in selfcheck.cases(torch.device(kind)) if other.layer == case.layer]
    assert {other.dtype for other in found} == set(selfcheck.DTYPES)
    assert {other.channels_last for other in found} == {False, case.layer != "LayerNorm"}


@every_layer
def test_a_wrong_result_is_named(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selfcheck, "cases", lambda device: [case])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert selfcheck.run(60.0) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out
    sound = one_step.run

    def damaged(case: Case, library: Any, tensors: Any) -> dict[str, Tensor]:
        results = sound(case, library, tensors)
        return {**results, "dx": results["dx"] * 1.001} if library is selfcheck.bnfast else results

    monkeypatch.setattr(one_step, "run", damaged)
    assert selfcheck.run(60.0) == 1
    printed = capsys.readouterr().out
    assert "0 passed, 1 failed" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("FAIL"))
    assert f"{case.layer} " in line
    assert " dx " in line
    assert len(line) <= 80


def test_no_time_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.run(-1.0) == 1
    assert "not started for lack of time" in capsys.readouterr().out
