"""python -m bnfast check: what it looks at, and that it tells right from wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bnfast import selfcheck
from bnfast.checks import one_step
from bnfast.checks.cases import Case, batch_renorm, group_norm, instance_norm, layer_norm

LAYERS = ("BatchNorm", "BatchRenorm", "GroupNorm", "InstanceNorm", "LayerNorm")
SMALL = [
    Case((4, 3, 5, 5)),
    batch_renorm((4, 3, 5, 5)),
    group_norm((2, 4, 5, 5), groups=2),
    instance_norm((2, 3, 5, 5)),
    layer_norm((5, 9)),
]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_in_every_dtype_and_layout(layer: str, kind: str) -> None:
    found = [case for case in selfcheck.cases(torch.device(kind)) if case.layer == layer]
    assert {case.dtype for case in found} == set(selfcheck.DTYPES)
    assert {case.channels_last for case in found} == ({False} if layer == "LayerNorm" else {False, True})


@pytest.mark.parametrize("case", SMALL, ids=str)
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
    lines = [line for line in printed.splitlines() if line.startswith("FAIL")]
    assert len(lines) == 1
    assert f"{case.layer} " in lines[0]
    assert " dx " in lines[0]
    assert len(lines[0]) <= 80


def test_no_time_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.run(-1.0) == 1
    assert "not started for lack of time" in capsys.readouterr().out
