"""Host time of an eager forward: everything but the driver, which is mocked. Timed against F.batch_norm in
the same run.

Not a benchmark: a bound that only a broken fast path (binding arguments anew at each launch, say) can miss.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bnfast
from bnfast import dispatch
from bnfast.kernels import batch_norm, launch, steps
from tests.support.fake_driver import fake_driver, host_microseconds

pytestmark = pytest.mark.static
# Of F.batch_norm's, gradient wanted or not: with one it is 3.0 on a quiet machine, which this one may not be.
TIMES = {False: 3.0, True: 3.5}


@pytest.mark.parametrize("gradient", [False, True], ids=["no gradient", "gradient"])
def test_forward(gradient: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        dispatch, "INTERPRET", True
    )  # CPU tensors take the kernels' path; the mock launches nothing
    monkeypatch.setattr(dispatch, "_suitable", {})
    monkeypatch.setattr(launch, "current_stream", lambda index: 0)
    monkeypatch.setattr(launch, "is_capturing", lambda: False)
    steps.forget_plans()
    x = torch.randn(2, 4, 2, 2)
    parameters = [torch.ones(4, requires_grad=gradient), torch.zeros(4, requires_grad=gradient)]
    buffers = [torch.zeros(4), torch.ones(4)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fake_driver() as driver:

            def ours() -> torch.Tensor:
                return bnfast.functional.batch_norm(x, *buffers, *parameters, True)

            def torchs() -> torch.Tensor:
                return F.batch_norm(x, *buffers, *parameters, True)

            ours()
            before = driver.launches
            ours()
            assert driver.launches - before == 2
            # Interleaved, and the quickest of many rounds: what else the machine does only ever adds time.
            rounds = [(host_microseconds(ours, 100, 1), host_microseconds(torchs, 100, 1)) for _ in range(60)]
            mine, other = (min(times) for times in zip(*rounds, strict=True))
    finally:
        torch.set_num_threads(threads)
        steps.forget_plans()
    with capsys.disabled():
        kind = "with" if gradient else "without"
        print(
            f"\n  host time of a forward {kind} gradient: {mine:.1f} us, "
            f"F.batch_norm {other:.1f} us, ratio {mine / other:.2f}"
        )
    assert mine <= TIMES[gradient] * other


def test_launch_binds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on, a launch goes straight to the compiled kernel, on this version of Triton
    too.
    """
    monkeypatch.setattr(launch, "current_stream", lambda index: 0)
    monkeypatch.setattr(launch, "is_capturing", lambda: False)
    steps.forget_plans()
    x = torch.randn(2, 4, 2, 2)
    with fake_driver():
        for _ in range(2):
            batch_norm.forward(x, None, None, None, None, None, False, 0.1, 1e-5)
        known = list(steps._steps.values())
        assert len(known) == 1
        assert all(step.first._bound and step.second._bound for step in known)
    steps.forget_plans()
