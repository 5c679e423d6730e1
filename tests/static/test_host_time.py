"""Host time of an eager forward: everything but the driver, which is mocked. Timed against F.batch_norm or
F.layer_norm in the same run.

Not a benchmark: a bound that only a broken fast path (binding arguments anew at each launch, say) can miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

import bnfast
from bnfast import dispatch
from bnfast.kernels import batch_norm, launch, steps
from tests.support.fake_driver import fake_driver, host_microseconds

pytestmark = pytest.mark.static
TIMES = 3.0  # of F.batch_norm's
TIMES_LAYER_NORM = 5.0  # of F.layer_norm's, which has less to do


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors take the kernels' path, and one thread does everything."""
    monkeypatch.setattr(dispatch, "INTERPRET", True)  # the mock launches nothing
    monkeypatch.setattr(dispatch, "_suitable", {})
    monkeypatch.setattr(launch, "current_stream", lambda index: 0)
    monkeypatch.setattr(launch, "is_capturing", lambda: False)
    steps.forget_plans()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    steps.forget_plans()


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], launches: int, times: float
) -> tuple[float, float]:  # fmt: skip
    """Microseconds of each, where ours launches so many kernels, and may take so many times the other's."""
    with fake_driver() as driver:
        ours()
        before = driver.launches
        ours()
        assert driver.launches - before == launches
        # Interleaved, and the quickest of many rounds: what else the machine does only ever adds time.
        # A machine with no quiet moment gets more of them.
        mine = other = float("inf")
        for done in range(1200):
            if done >= 60 and mine <= times * other:
                break
            mine = min(mine, host_microseconds(ours, 100, 1))
            other = min(other, host_microseconds(theirs, 100, 1))
    return mine, other


def report(capsys: pytest.CaptureFixture[str], what: str, gradient: bool, mine: float, other: float) -> None:
    with capsys.disabled():
        kind = "with" if gradient else "without"
        print(
            f"\n  host time of a forward {kind} gradient: {mine:.1f} us, "
            f"{what} {other:.1f} us, ratio {mine / other:.2f}"
        )


BOTH = pytest.mark.parametrize("gradient", [False, True], ids=["no gradient", "gradient"])


@BOTH
@pytest.mark.usefixtures("mocked")
def test_forward(gradient: bool, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 4, 2, 2)
    parameters = [torch.ones(4, requires_grad=gradient), torch.zeros(4, requires_grad=gradient)]
    given = (x, torch.zeros(4), torch.ones(4), *parameters, True)
    mine, other = compare(
        lambda: bnfast.functional.batch_norm(*given), lambda: F.batch_norm(*given), 2, TIMES
    )
    report(capsys, "F.batch_norm", gradient, mine, other)
    assert mine <= TIMES * other


@BOTH
@pytest.mark.usefixtures("mocked")
def test_layer_norm(gradient: bool, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(4, 64)
    parameters = [torch.ones(64, requires_grad=gradient), torch.zeros(64, requires_grad=gradient)]
    given = (x, (64,), *parameters)
    mine, other = compare(
        lambda: bnfast.functional.layer_norm(*given), lambda: F.layer_norm(*given), 1, TIMES_LAYER_NORM
    )
    report(capsys, "F.layer_norm", gradient, mine, other)
    assert mine <= TIMES_LAYER_NORM * other


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
