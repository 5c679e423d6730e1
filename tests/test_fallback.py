"""When the kernels cannot: sizes beyond their arithmetic, a Triton that is too old or absent. Plain torch
does it then, once and completely, at no needless cost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import bnfast
from bnfast.checks.cases import placed
from bnfast.kernels import launch_plan, plan
from tests.support import kernel_calls as kernels
from tests.support.layers import both_modes, data

ROOT = Path(__file__).resolve().parent.parent
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
LONG_RUNS = (1, 2, 48, 48)  # counted in vectors of 4 it is within LIMIT, and counted in elements it is not
LIMIT = 4000


def forget() -> None:
    """Plans are kept, by their sizes."""
    plan.plan_reduction.cache_clear()
    plan.plan_elementwise.cache_clear()
    launch_plan.forget_plans()


@pytest.fixture
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sizes that kernels and tests can hold stand for those that nobody's memory does."""
    forget()
    monkeypatch.setattr(plan, "INT32", request.param)
    yield
    forget()


def pair(channels: int, training: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(channels).train(training)
    for tensor in (*theirs.parameters(), theirs.running_mean):
        nn.init.normal_(tensor)
    ours = bnfast.BatchNorm2d(channels).train(training)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    gradients = torch.autograd.grad(y, [x, module.weight, module.bias], dy)
    named = dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients), strict=True))
    return named | {name: t.clone() for name, t in module.named_buffers()}


@pytest.mark.parametrize("limit", [100], indirect=True)
@pytest.mark.usefixtures("limit")
def test_planning_refuses_what_is_too_large() -> None:
    x = data(3, 4, 8, 8)
    mean, variance = torch.zeros(4), torch.ones(4)
    with pytest.raises(plan.TooLarge):
        kernels.batch_norm_train(x, None, None, mean, variance)
    with pytest.raises(plan.TooLarge):
        kernels.batch_norm_eval(x, mean, variance, keep=False)
    with pytest.raises(plan.TooLarge):
        kernels.batch_norm_backward(x, x, torch.zeros(4, 4), (True, None, None))
    assert not mean.any()


@both_modes
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("limit", [100], indirect=True)
@pytest.mark.usefixtures("limit")
def test_layer_falls_back(gradient: bool, training: bool, launches: list[Any]) -> None:
    """Before anything is updated, so that the batch counts once."""
    ours, theirs = pair(4, training)
    x, dy = data(3, 4, 8, 8), data(3, 4, 8, 8, seed=1)
    if gradient:
        assert_close(step(ours, x, dy), step(theirs, x, dy), **CLOSE)
    else:
        with torch.no_grad():
            assert_close(ours(x), theirs(x), **CLOSE)
        assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), **CLOSE)
    assert not launches


@both_modes
@pytest.mark.parametrize("limit", [LIMIT], indirect=True)
@pytest.mark.usefixtures("limit")
def test_backward_falls_back(training: bool, launches: list[Any]) -> None:
    """The forward had whole vectors. A dy without them makes more of the same sizes."""
    x, dy = data(*LONG_RUNS), data(*LONG_RUNS, seed=1)
    ours, theirs = pair(2, training)
    assert_close(step(ours, x, dy), step(theirs, x, dy), **CLOSE)
    usual = 4 if training else 2
    assert len(launches) == usual
    launches.clear()
    assert_close(step(ours, x, placed(dy, "offset")), step(theirs, x, dy), **CLOSE)
    assert len(launches) == usual // 2


class Clones(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["torch"], indirect=True)
@pytest.mark.parametrize(
    ("frozen", "grad_mode", "of_x", "expected"),
    [
        (True, True, False, 0),
        (True, True, True, 2),
        (False, True, False, 2),
        (False, False, True, 0),
    ],
)
def test_statistics_are_copied_for_a_gradient_only(
    frozen: bool, grad_mode: bool, of_x: bool, expected: int, path: str
) -> None:
    """In eval torch's backward reads them again: a copy each, unless there will be no backward."""
    module = bnfast.BatchNorm2d(4).eval().requires_grad_(not frozen)
    x = data(3, 4, 2, 3).requires_grad_(of_x)
    with torch.set_grad_enabled(grad_mode), Clones() as clones:
        module(x)
    assert clones.count == expected
    with Clones() as clones:
        module.train()(x)
    assert clones.count == 0


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
    """Older torch builds bring older ones, and builds without CUDA none. That the interpreter is asked for
    makes no kernels."""
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(source + "\n")
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(words) >= 5, done.stdout  # a line of info for each dtype, and check's
