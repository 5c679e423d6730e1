"""How bnfast's layers get into other libraries' registries: whenever those are imported, and whether they are
as expected or not; and what counters and explainers, which have such, make of the layers."""

from __future__ import annotations

import copy
import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from bnfast import importing
from bnfast.importing import when_imported
from tests.support.foreign import BatchNormAct2d, put_in_place


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a module `registry` that holds a table."""
    package = tmp_path / "some_library"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "registry.py").write_text("TABLE = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importing, "_awaited", {})
    yield "some_library.registry"
    for name in [name for name in sys.modules if name.startswith("some_library")]:
        del sys.modules[name]


def test_imported_later(library: str) -> None:
    seen: list[Any] = []
    when_imported(library, seen.append)
    assert not seen
    spec = importlib.util.find_spec(library)
    assert spec is not None
    assert "TABLE" in spec.loader.get_source(library)  # type: ignore[union-attr]
    importlib.import_module("some_library")
    assert not seen
    module = importlib.import_module(library)
    assert seen == [module]
    assert module.TABLE == {}
    assert "bnfast" not in f"{type(module.__loader__)}{type(module.__spec__.loader)}"
    importlib.import_module(library)
    assert len(seen) == 1
    importlib.reload(module)  # which empties the table
    assert seen == [module, module]


def test_imported_already(library: str) -> None:
    module, seen = importlib.import_module(library), []
    when_imported(library, seen.append)
    assert seen == [module]


@pytest.mark.parametrize("before", [True, False])
def test_one_that_is_not_as_expected(library: str, before: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It is imported all the same, and somebody is told."""
    if before:
        importlib.import_module(library)
    when_imported(library, lambda module: module.TABEL)
    importlib.import_module(library)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "some_library.registry, in the installed version, does not get to know" in record.getMessage()
    assert "use bnfast.revert(model) before" in record.getMessage()


def test_one_that_is_not_there(library: str) -> None:
    when_imported("some_library.none", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="some_library.none"):
        importlib.import_module("some_library.none")
    assert importlib.util.find_spec("some_library.none") is None


ORDERS = """
import sys
from torch import nn
{first}
{second}
assert "torch.ao.quantization.quantize_fx" not in sys.modules
model = nn.Sequential(nn.Conv2d(1, 2, 1), bnfast.BatchNorm2d(2)).eval()
print(len(list(fuse(model).children())))
"""


def test_before_bnfast_in_a_new_process() -> None:
    """And no library is imported by bnfast. (All other tests import what they test after it.)"""
    optimizer = "from torch.fx.experimental.optimization import fuse"
    program = ORDERS.format(first=optimizer, second="import bnfast")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["1"], done.stderr


# Counters of operations


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm([5, 6]),
    ).eval()  # fmt: skip


def test_thop() -> None:
    profile = pytest.importorskip("thop").profile
    x = torch.randn(2, 3, 5, 6)
    expected = profile(network(), (x,), verbose=False)
    assert profile(bnfast.convert(network()), (x,), verbose=False) == expected
    assert expected[0] > profile(network()[0], (x,), verbose=False)[0]


def test_ptflops() -> None:
    count = pytest.importorskip("ptflops").get_model_complexity_info
    arguments: Any = {"backend": "pytorch", "as_strings": False, "print_per_layer_stat": False}
    expected = count(network(), (3, 5, 6), **arguments)
    assert count(bnfast.convert(network()), (3, 5, 6), **arguments) == expected


# Explanations


def explained(model: nn.Module) -> Tensor:
    captum = pytest.importorskip("captum.attr")
    generator = torch.Generator().manual_seed(1)
    x, base = torch.randn(2, 2, 3, 5, 6, generator=generator, dtype=torch.float64)
    whole = nn.Sequential(model, nn.Flatten(), nn.Linear(120, 2, dtype=torch.float64))
    torch.manual_seed(2)
    nn.init.normal_(whole[2].weight)
    found: Tensor = captum.DeepLift(whole).attribute(x, base, target=1).detach()
    difference = (whole(x) - whole(base))[:, 1]  # which is what is explained
    assert difference.abs().min() > 0.1
    assert_close(found.sum((1, 2, 3)), difference)
    return found


def normalized(norm: nn.Module, *behind: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, *behind).double().eval()
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.linspace(0.5, 1.5, 4) * (0.2 if name in ("bias", "running_mean") else 1))
    return model


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_deep_lift(monkeypatch: pytest.MonkeyPatch) -> None:
    """The activation within a layer counts as the one behind it."""
    put_in_place(monkeypatch)
    expected = explained(normalized(nn.BatchNorm2d(4), nn.ReLU()))
    assert (expected - explained(normalized(nn.BatchNorm2d(4)))).abs().max() > 0.1
    frozen = bnfast.FrozenBatchNorm2d(4, activation="relu")
    for norm in (
        bnfast.BatchNorm2d(4, activation="relu"),
        bnfast.BatchRenorm2d(4, activation="relu"),
        frozen,
    ):
        assert_close(explained(normalized(norm)), expected)
        assert_close(explained(bnfast.revert(normalized(copy.deepcopy(norm)))), expected)
    assert_close(explained(bnfast.convert(normalized(BatchNormAct2d(4, nn.ReLU())))), expected)
    assert_close(explained(bnfast.fuse(normalized(nn.BatchNorm2d(4), nn.ReLU()))), expected)
    assert_close(
        explained(bnfast.convert(normalized(nn.BatchNorm2d(4)))), explained(normalized(nn.BatchNorm2d(4)))
    )
    with pytest.raises(
        RuntimeError, match="DeepLift has no rule for GroupNorm with an activation of its own"
    ):
        explained(normalized(bnfast.GroupNorm(2, 4, activation="relu")))


# torch.func


def test_replace_all_batch_norm_modules() -> None:
    model = nn.Sequential(bnfast.BatchNorm2d(2), nn.BatchNorm2d(2)).double()
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    torch.func.replace_all_batch_norm_modules_(model)
    for layer in model:
        assert layer.running_mean is None
        assert_close(layer.eval()(x), nn.BatchNorm2d(2, track_running_stats=False).double()(x))
    renorm = nn.Sequential(bnfast.BatchRenorm2d(2))
    torch.func.replace_all_batch_norm_modules_(renorm)
    for training in (True, False):
        with pytest.raises(
            RuntimeError, match="BatchRenorm2d has lost its running statistics.*bnfast.revert"
        ):
            renorm.train(training)(x.float())


def test_lightnings_way_to_freeze() -> None:
    """Which leaves a BatchNorm training, without its running statistics."""
    finetuning = pytest.importorskip("lightning.pytorch.callbacks").BaseFinetuning
    model = nn.Sequential(bnfast.BatchNorm2d(2), bnfast.BatchRenorm2d(2))
    x, before = torch.randn(3, 2, 2, 2), copy.deepcopy(model.state_dict())
    finetuning.freeze(model, train_bn=False)
    assert_close(model[0](x), nn.BatchNorm2d(2)(x))
    with pytest.raises(
        RuntimeError, match=r"BatchRenorm2d cannot train .*BaseFinetuning.freeze sets: call eval\(\)"
    ):
        model(x)
    model[1].eval()
    model(x)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    finetuning.make_trainable(model)
    model.train()(x)
    assert (model[1].running_var != 1).all()
