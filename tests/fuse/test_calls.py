"""What runs when a module is called, beside its forward: fused or not, it runs once."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfast
from tests.support.fused import CHANNELS, CONV, Block, conv_norm_act, data, fused_count, pair, reason
from tests.support.training import assert_same_training, record

pytestmark = pytest.mark.usefixtures("plain_torch")


class Doubled:
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args) * 2  # type: ignore[misc]


class DoubledInside:
    def _call_impl(self, *args: Any) -> Any:
        return super()._call_impl(*args) * 2  # type: ignore[misc]

    _wrapped_call_impl = _call_impl


def _kind(base: type, how: type) -> Any:
    """A subclass, called in a way that stands two classes above it."""
    return type("Derived", (type("Between", (how, base), {}),), {})


NORM, OURS = nn.BatchNorm2d, bnfast.BatchNorm2d
OWN = "has a __call__ or a _call_impl of its own"
# name: (block, why its layers are not fused)
MODELS: dict[str, tuple[Callable[[type], nn.Module], list[str]]] = {
    "convolution": (lambda how: nn.Sequential(NORM(CHANNELS), nn.ReLU(), _kind(nn.Conv2d, how)(*CONV)), []),
    "activation": (lambda how: conv_norm_act(_kind(nn.ReLU, how)()), [f"Derived (2) {OWN}"]),
    "activation added after": (lambda how: nn.Sequential(*conv_norm_act(), _kind(nn.ReLU, how)()), []),
    "identity": (
        lambda how: nn.Sequential(NORM(CHANNELS), _kind(nn.Identity, how)(), nn.ReLU()),
        [f"Derived (1) {OWN}"],
    ),
    "layer": (lambda how: nn.Sequential(_kind(OURS, how)(CHANNELS), nn.ReLU()), [f"Derived {OWN}"]),
    "shortcut": (
        lambda how: Block(lambda b, y, x: F.relu(y + b.other(x)), other=_kind(nn.Conv2d, how)(*CONV)),
        ["other, before the add, may write in place"],
    ),
    "Sequential": (
        lambda how: Block(
            lambda b, y, x: F.relu(b.other(x)), other=_kind(nn.Sequential, how)(*conv_norm_act()[:2])
        ),
        ["its output is not used", "its output is the block's"],
    ),
    "block": (lambda how: nn.Sequential(_kind(nn.Sequential, how)(*conv_norm_act()), nn.Tanh()), []),
}  # fmt: skip


@pytest.mark.parametrize("how", [Doubled, DoubledInside])
@pytest.mark.parametrize("name", MODELS)
def test_called_once(name: str, how: type) -> None:
    make, reasons = MODELS[name]
    ours, theirs = pair(lambda: make(how))
    assert [s.reason for s in bnfast.fusion_report(ours).skipped] == reasons
    assert_same_training(record(ours, data()), record(theirs, data()))


def _doubled(attribute: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        original = module._call_impl
        setattr(module, attribute, lambda *args: original(*args) * 2)

    return change


def _wrapped(how: type) -> Callable[[nn.Module], None]:
    """As a library does it that wraps what it is given."""

    def change(module: nn.Module) -> None:
        module.__class__ = type(type(module).__name__, (how, type(module)), {})

    return change


# What may become of a child afterwards, and whether the site goes.
@pytest.mark.parametrize(
    "change",
    [_doubled("_call_impl"), _doubled("_compiled_call_impl"), _wrapped(Doubled), _wrapped(DoubledInside)],
)
@pytest.mark.parametrize("child", [0, 1, 2])
@pytest.mark.parametrize("before", [True, False], ids=["before", "since"])
def test_called_otherwise(change: Callable[[nn.Module], None], child: int, before: bool) -> None:
    theirs = bnfast.convert(conv_norm_act().double())
    ours = copy.deepcopy(theirs)
    if before:
        change(ours[child])
    bnfast.fuse(ours)
    if not before:
        change(ours[child])
    change(theirs[child])
    assert fused_count(ours) == (child == 0)
    torch.testing.assert_close(ours(data()), theirs(data()))


def test_all_calls_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(conv_norm_act)
    call = nn.Module.__call__
    seen: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: (seen.append(self), call(self, *args))[1])
    assert fused_count(ours) == 0
    torch.testing.assert_close(ours(data()), theirs(data()))
    assert [type(m) for m in seen[:4]] == [type(ours), nn.Conv2d, bnfast.BatchNorm2d, nn.ReLU]
    assert reason(bnfast.fuse(ours)) == "torch.nn.Module's __call__ or _call_impl has been replaced"


@pytest.mark.parametrize("child", [Doubled, DoubledInside])
def test_compiles_in_one_graph(child: type) -> None:
    ours, theirs = pair(lambda: MODELS["convolution"][0](child))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="eager")(data()), theirs(data()))


def test_fused_once_compiled_in_place() -> None:
    model, theirs = conv_norm_act().double().eval(), conv_norm_act().double().eval()
    model.load_state_dict(theirs.state_dict())
    torch._dynamo.reset()
    model.compile(backend="eager", fullgraph=True)
    model(data())
    bnfast.fuse(model)
    torch.testing.assert_close(model(data()), theirs(data()))


def test_what_the_garbage_collector_calls_is_no_part_of_a_forward() -> None:
    """Some libraries have it tell them of each run, and look at the clock then."""
    run: list[float] = []

    def note(phase: str, info: dict[str, int]) -> None:
        run.append(time.perf_counter())

    before = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1)
    try:
        model = bnfast.fuse(conv_norm_act())
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(note)
    assert run
    assert fused_count(model) == 1


def test_an_import_is_no_part_of_a_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch imports some of its modules at the first call of what needs them."""

    def imports(b: Any, y: Any, x: Any) -> Any:
        import imported_at_the_first_call  # noqa: F401

        return F.relu(y)

    (tmp_path / "imported_at_the_first_call.py").write_text("import os\nCOUNT = len(os.environ)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert fused_count(bnfast.fuse(Block(imports))) == 1
