"""When the kernels cannot: sizes beyond their arithmetic, a Triton that is too old or absent. Plain torch
does it then, once and completely, at no needless cost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import bnfast
from bnfast.checks.cases import placed
from bnfast.kernels import plan
from tests.support.layers import BY_NAME, assert_same, both_modes, data, step

ROOT = Path(__file__).resolve().parent.parent
LAYER = BY_NAME["BatchNorm2d"]
LONG_RUNS = (1, 2, 48, 48)  # counted in vectors of 4 it is within 4000, and counted in elements it is not
X = data(3, 4, 8, 8)


@pytest.fixture
def limit(
    request: pytest.FixtureRequest, nothing_known: dict, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Lowers the limit of the kernels' arithmetic, so that small sizes stand for those that fill a GPU."""
    planners = (plan.plan_reduction, plan.plan_elementwise)  # which keep plans, by their sizes
    for planner in planners:
        planner.cache_clear()
    monkeypatch.setattr(plan, "INT32", request.param)
    yield
    for planner in planners:
        planner.cache_clear()


@both_modes
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("limit", [100], indirect=True)
@pytest.mark.usefixtures("limit")
def test_layer_falls_back(gradient: bool, training: bool, launches: list[Any]) -> None:
    """Before anything is updated, so that the batch counts once."""
    ours, theirs = (module.train(training) for module in LAYER.pair())
    if gradient:
        assert_same(step(ours, X), step(theirs, X))
    else:
        with torch.no_grad():
            assert_close(ours(X), theirs(X), rtol=1e-5, atol=2e-5)
        assert_same(ours.state_dict(), theirs.state_dict())
    assert not launches


@both_modes
@pytest.mark.parametrize("limit", [4000], indirect=True)
@pytest.mark.usefixtures("limit", "two_launches")
def test_backward_falls_back(training: bool, launches: list[Any]) -> None:
    """The forward had whole vectors. A dy without them makes more of the same sizes."""
    x = data(*LONG_RUNS)
    for storage, count in (("dense", 4), ("offset", 2)):
        results = []
        for module in replace(LAYER, arguments=(2,)).pair():
            leaf = x.clone().requires_grad_()
            y = module.train(training)(leaf)
            y.backward(placed(data(*LONG_RUNS, seed=1), storage))
            gradients = [leaf.grad, module.weight.grad, module.bias.grad]
            results.append([y.detach(), *gradients, module.state_dict()])
        assert_close(*results, rtol=1e-5, atol=2e-5)
        assert len(launches) == (count if training else count // 2)
        launches.clear()


def clones(call: Callable[[], object]) -> int:
    """How many tensors a call copies."""
    with torch.autograd.profiler.profile() as profiler:
        call()
    return sum(event.name == "aten::clone" for event in profiler.function_events)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    ("frozen", "grad_mode", "of_x", "expected"),
    [(True, True, False, 0), (True, True, True, 2), (False, True, False, 2), (False, False, True, 0)],
)
def test_statistics_are_copied_for_a_gradient_only(
    frozen: bool, grad_mode: bool, of_x: bool, expected: int
) -> None:
    """In eval torch's backward reads them again: a copy each, unless there will be no backward."""
    module = bnfast.BatchNorm2d(4).eval().requires_grad_(not frozen)
    x = data(3, 4, 2, 3).requires_grad_(of_x)
    with torch.set_grad_enabled(grad_mode):
        assert clones(lambda: module(x)) == expected
    assert clones(lambda: module.train()(x)) == 0


PROGRAM = """
import torch, bnfast
from bnfast import dispatch
from bnfast.__main__ import check, info

torch.manual_seed(0)
ours, theirs = bnfast.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
for _ in range(2):
    x = torch.randn(3, 4, 2, 3, requires_grad=True)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (a, b)))
torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
assert not dispatch.TRITON
assert info() == 0
assert check(1.0) == 1
"""
TRITONS = {
    "3.3.0": ('__version__ = "3.3.0"', "Triton 3.3.0 is too old: the kernels need 3.6 or newer"),
    "3.5.1+git1234": ('__version__ = "3.5.1+git1234"', "Triton 3.5.1+git1234 is too old"),
    "absent": ("raise ImportError('libtriton.so: cannot open')", "Triton is not installed"),
}


@pytest.mark.parametrize(("source", "words"), TRITONS.values(), ids=TRITONS.keys())
def test_without_a_triton_to_use(source: str, words: str, tmp_path: Path) -> None:
    """Older torch builds bring older ones, and builds without CUDA bring none. The interpreter needs Triton
    too, so asking for it makes no kernels."""
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(source + "\n")
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(words) >= 5, done.stdout  # a line of info for each dtype, and check's
