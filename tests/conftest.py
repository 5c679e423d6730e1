"""For all tests: an interpreter that rounds bf16 as a GPU; fixtures that say which path a call takes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import bnfast
from bnfast import dispatch, exact
from bnfast.interpreted import prepared
from bnfast.kernels import batch_plan, launch_plan
from bnfast.kernels.launch import INTERPRET, Launch
from tests.support import oracle


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="of each test's cases only every Nth, from the first",
    )
    parser.addoption(
        "--compiled",
        action="store_true",
        help="execute the kernels' compiled PTX on the CPU, for tests that are marked so",
    )
    parser.addoption(
        "--perturb",
        type=int,
        default=0,
        metavar="N",
        help="with --compiled, move approximate instructions within their documented error, each N otherwise",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    step, seen, left_out = config.getoption("--sample"), Counter[str](), []
    for item in [*items] if step > 1 else ():
        test = item.nodeid.partition("[")[0]
        if seen[test] % step:
            items.remove(item)
            left_out.append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and (reason := oracle.unfit()) is not None:
        pytest.skip(reason)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU in tests and cases that are marked gpu; else the CPU, on which kernels are interpreted."""
    return torch.device("cpu" if request.node.get_closest_marker("gpu") is None else "cuda")


@pytest.fixture(scope="session")
def executor() -> None:
    """For tests of what executes PTX, which needs a C compiler."""
    from bnfast.ptx import library

    try:
        library.load()
    except library.MissingCompiler as missing:
        pytest.skip(str(missing))


SCHEDULES = (1, 2, 3)  # of the programs and warps of each launch that is executed


@pytest.fixture(autouse=True, scope="session")
def _executed(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """With --compiled, CPU tensors take the kernels' path, and each launch is executed. Gives the
    executions."""
    if not request.config.getoption("--compiled"):
        yield []
        return
    from bnfast.ptx import executing

    perturb = request.config.getoption("--perturb")
    # Each division may then be off by 2 units: the mean by 2 of its distance from the pivot, the variance by
    # 2, of which its root keeps 1, and one over that root by 2.
    with (
        mock.patch.object(exact, "MOVED", 3.0 if perturb else 0.0),
        executing(seeds=SCHEDULES, perturb=perturb) as executed,
    ):
        yield executed


@pytest.fixture
def executed(_executed: list[Any], request: pytest.FixtureRequest) -> list[Any]:
    """Grows by an Execution with each launch."""
    if not request.config.getoption("--compiled"):
        pytest.skip("it needs --compiled")
    return _executed


@pytest.fixture(autouse=True)
def _interpreter(_executed: list[Any]) -> Iterator[None]:
    _executed.clear()
    with prepared() if INTERPRET else contextlib.nullcontext():
        yield


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels, for tests of what is called and not of what that computes."""
    monkeypatch.setattr(dispatch, "INTERPRET", False)


@pytest.fixture
def path(request: pytest.FixtureRequest) -> str:
    """CPU tensors run the kernels in the interpreter; without INTERPRET they run plain torch."""
    if request.param == "torch":
        request.getfixturevalue("plain_torch")
    return request.param


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with each kernel launched."""
    seen: list[Any] = []
    call = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *args: (seen.append(self), call(self, *args))[1])
    return seen


@pytest.fixture
def nothing_known() -> Iterator[dict]:
    """The known launch plans, emptied for the test."""
    launch_plan.forget_plans()
    yield launch_plan._plans
    launch_plan.forget_plans()


@pytest.fixture
def two_launches(nothing_known: dict, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """BatchNorm trains as with large tensors: no program has whole channels."""
    monkeypatch.setattr(batch_plan, "WARPS", ())
    batch_plan.plan_whole.cache_clear()
    yield
    batch_plan.plan_whole.cache_clear()


@pytest.fixture
def several_programs(nothing_known: dict, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of multiprocessors of the interpreter: enough that channels are split and blocks share rows,
    few enough to be quick."""
    monkeypatch.setenv("BNFAST_INTERPRETER_SMS", "3")
    return 3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, bool]]:
    """Grows by (activation, with a residual) with each call of a BatchNorm2d."""
    seen: list[tuple[str | None, bool]] = []
    normalize = bnfast.BatchNorm2d.normalize

    def noted(self: Any, input: Any, activation: Any, residual: Any) -> Any:
        seen.append((activation and activation.name, residual is not None))
        return normalize(self, input, activation, residual)

    monkeypatch.setattr(bnfast.BatchNorm2d, "normalize", noted)
    return seen


@pytest.fixture
def plain_torch_in_one_thread(plain_torch: None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of ResNet-50 in benchmarks of its training step, a network of four layers."""
    from benchmarks import memory, resnet
    from tests.support.steps import four_layers

    assert memory.resnet50 is resnet.resnet50  # imported before, it keeps the real one

    monkeypatch.setattr(resnet, "resnet50", four_layers)
