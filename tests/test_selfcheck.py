"""python -m bnfast check: what it covers, and that it tells right from wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bnfast import selfcheck
from bnfast.checks import one_step

LAYERS = ("BatchNorm", "BatchRenorm", "GroupNorm", "InstanceNorm", "LayerNorm")


def test_on_a_gpu_it_needs_no_numpy() -> None:
    """setup.py does not ask for it."""
    program = "import sys; sys.modules['numpy'] = None; import bnfast.selfcheck"
    subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, env={**os.environ, "TRITON_INTERPRET": "0"}
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_layer_in_every_dtype_and_layout(device: str) -> None:
    found = {(case.layer, case.dtype, case.channels_last) for case in selfcheck.cases(torch.device(device))}
    layouts = {(layer, last) for layer in LAYERS for last in (False, True)} - {("LayerNorm", True)}
    assert found == {(layer, dtype, last) for layer, last in layouts for dtype in selfcheck.DTYPES}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_wrong_result_is_named(
    layer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = next(case for case in selfcheck.cases(torch.device("cpu")) if case.layer == layer)
    monkeypatch.setattr(selfcheck, "cases", lambda device: [case])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert selfcheck.run(60.0) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out
    sound = one_step.run

    def damaged(case: Any, library: Any, tensors: Any) -> Any:
        results = sound(case, library, tensors)
        return {**results, "dx": results["dx"] * 1.001} if library is selfcheck.bnfast else results

    monkeypatch.setattr(one_step, "run", damaged)
    assert selfcheck.run(60.0) == 1
    printed = capsys.readouterr().out
    assert "0 passed, 1 failed" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("FAIL"))
    assert {layer, "dx"} < set(line.split())
    assert len(line) <= 80


def test_no_time_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.run(-1.0) == 1
    assert "not started for lack of time" in capsys.readouterr().out
