"""Host time of an eager forward: everything but the driver, which is mocked. Timed against F.batch_norm or
F.layer_norm in the same run.

Not a benchmark: a bound that only a broken fast path (binding arguments anew at each launch, say) can miss.
The bounds are in codegen/budgets.csv.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bnfast
from benchmarks import host, timing
from codegen import budgets
from codegen.fake_driver import host_microseconds
from codegen.launches import as_on_a_gpu

pytestmark = pytest.mark.static


def arguments(function: str, gradient: bool) -> tuple[object, ...]:
    def parameter(value: float, size: int) -> Tensor:
        return torch.full((size,), value, requires_grad=gradient)

    if function == "layer_norm":
        return torch.randn(4, 64), (64,), parameter(1.0, 64), parameter(0.0, 64)
    statistics = torch.zeros(4), torch.ones(4)
    return torch.randn(2, 4, 2, 2), *statistics, parameter(1.0, 4), parameter(0.0, 4), True


@pytest.mark.parametrize("gradient", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("function", ["batch_norm", "layer_norm"])
def test_a_forward_is_within_its_budget(
    function: str, gradient: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our function launches as many kernels as the budget says, and takes at most so many times as long as
    torch's."""
    launches, ratio = budgets.host(function)
    given = arguments(function, gradient)
    ours, theirs = (
        functools.partial(getattr(library, function), *given) for library in (bnfast.functional, F)
    )
    mine = other = float("inf")
    with timing.one_thread(), as_on_a_gpu() as driver:
        ours()
        before = driver.launches
        ours()
        assert driver.launches - before == launches
        # Interleaved, and the quickest of many rounds: what else the machine does only ever adds time.
        # A machine with no quiet moment gets more of them.
        for done in range(1200):
            if done >= 60 and mine <= ratio * other:
                break
            mine = min(mine, host_microseconds(ours, 100, 1))
            other = min(other, host_microseconds(theirs, 100, 1))
    told = (
        f"host time of a forward {'with' if gradient else 'without'} gradient: {mine:.1f} us, "
        f"F.{function} {other:.1f} us, ratio {mine / other:.2f}"
    )
    with capsys.disabled():
        print(f"\n  {told}")
    assert mine <= ratio * other, f"{told}; {budgets.PATH.name} allows {ratio}"


def test_the_host_job_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four functions with and without gradient, ours and torch's."""
    monkeypatch.setattr(host, "ROUNDS", 2)
    monkeypatch.setattr(host, "CALLS", 2)
    options = argparse.Namespace(device="cpu", out=tmp_path)
    assert host.run(options, ["matplotlib"]) == 0
    (file,) = tmp_path.glob("*/host.csv")
    found = pd.read_csv(file)
    assert len(found) == found["function"].nunique() == 8
    assert (found[["bnfast us", "torch us"]] > 0).all(axis=None)
    assert found["versions"].str.startswith("bnfast=").all()
