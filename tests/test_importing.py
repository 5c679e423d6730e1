"""Libraries that are imported after bnfast or before it, and in odd ways: beside other finders, in part,
lazily, again."""

from __future__ import annotations

import copy
import importlib
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader, find_spec, module_from_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import bnfast
from bnfast import importing
from bnfast.importing import catch_up, when_imported

NAME = "odd_library.registry"


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a module `registry` that holds a table; the module's file."""
    package = tmp_path / "odd_library"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "registry.py").write_text("TABLE = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importing, "_awaited", {})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f) is not importing._Finder])
    yield package / "registry.py"
    for name in [name for name in sys.modules if name.startswith("odd_library")]:
        del sys.modules[name]


def enter(module: Any) -> None:
    module.TABLE["ours"] = True


def entered() -> bool:
    return importlib.import_module(NAME).TABLE == {"ours": True}


def test_imported_later() -> None:
    seen: list[Any] = []
    when_imported(NAME, seen.append)
    assert not seen
    for _ in range(2):
        module = importlib.import_module(NAME)
        assert seen == [module]
    assert module.TABLE == {}
    assert "bnfast" not in f"{type(module.__loader__)}{type(module.__spec__.loader)}"


def test_one_that_is_not_as_expected(caplog: pytest.LogCaptureFixture) -> None:
    """It is imported all the same, with a warning."""
    when_imported(NAME, lambda module: module.TABEL)
    importlib.import_module(NAME)
    catch_up()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{NAME}, in the installed version, does not get to know" in record.getMessage()
    assert "use bnfast.revert(model) before" in record.getMessage()


def delegate(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
    """Asks the other finders, whichever these are, as bnfast's does."""
    others = (finder.find_spec for finder in sys.meta_path if finder.find_spec != delegate)
    return next(filter(None, (find(fullname, path, target) for find in others)), None)


FINDERS = {"delegating": delegate, "bypassing": PathFinder.find_spec}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
def test_beside_other_finders(find: Any, place: int) -> None:
    when_imported(NAME, enter)
    sys.meta_path.insert(place, SimpleNamespace(find_spec=find))  # type: ignore[arg-type]
    importlib.import_module(NAME)
    catch_up()  # needed where bnfast's finder was not asked
    assert entered()


def test_a_finder_that_forbids_it_is_obeyed() -> None:
    def forbid(fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == NAME:
            raise ImportError("forbidden here")

    when_imported(NAME, enter)
    sys.meta_path.insert(1, SimpleNamespace(find_spec=forbid))  # type: ignore[arg-type]
    with pytest.raises(ImportError, match="forbidden here"):
        importlib.import_module(NAME)
    del sys.meta_path[1]
    assert entered()


def test_while_another_thread_imports_it(library: Path) -> None:
    """The other thread is waited for."""
    library.write_text("from odd_library import started, go\nstarted.set()\ngo.wait(60)\nTABLE = {}\n")
    package: Any = importlib.import_module("odd_library")
    package.started, package.go = threading.Event(), threading.Event()
    thread = threading.Thread(target=importlib.import_module, args=(NAME,))
    thread.start()
    assert package.started.wait(60)
    threading.Timer(0.2, package.go.set).start()
    when_imported(NAME, enter)
    assert sys.modules[NAME].TABLE == {"ours": True}  # type: ignore[attr-defined]
    thread.join()


def test_from_within_it(library: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As happens where it imports code that imports bnfast."""
    library.write_text("import odd_library\nodd_library.call()\nTABLE = {}\n")
    importlib.import_module("odd_library").call = lambda: when_imported(NAME, enter)  # type: ignore[attr-defined]
    importlib.import_module(NAME)
    bnfast.convert(bnfast.BatchNorm2d(2))
    assert entered()
    assert not caplog.records


LATER = {
    "construction": lambda: bnfast.BatchNorm2d(2),
    "construction of constants": lambda: bnfast.FrozenBatchNorm2d(2),
    "convert": lambda: bnfast.convert(bnfast.modules.plain.BatchNorm2d(2)),
    "subclass": lambda: type("Mine", (bnfast.LayerNorm,), {}),
}


@pytest.mark.parametrize("then", LATER.values(), ids=LATER.keys())
def test_filled_after_it_was_there(then: Any, caplog: pytest.LogCaptureFixture) -> None:
    module: Any = ModuleType(NAME)
    sys.modules[NAME] = module
    when_imported(NAME, enter)
    catch_up()
    assert len(caplog.records) == 1  # for both attempts
    module.TABLE = {}
    with caplog.at_level(logging.INFO, "bnfast"):
        then()
    assert module.TABLE == {"ours": True}
    assert "gets to know bnfast's layers after all" in caplog.text
    module.TABLE.clear()
    then()
    assert not module.TABLE  # it is done once


@pytest.mark.parametrize("before", [True, False])
def test_loaded_lazily(before: bool) -> None:
    if not before:
        when_imported(NAME, enter)
    spec: Any = find_spec(NAME)
    spec.loader = LazyLoader(spec.loader)
    module = sys.modules[NAME] = module_from_spec(spec)
    spec.loader.exec_module(module)
    if before:
        when_imported(NAME, enter)
    catch_up()
    assert "TABLE" not in object.__getattribute__(module, "__dict__")
    assert module.__name__ == NAME  # this loads it
    catch_up()
    assert module.TABLE == {"ours": True}


def test_its_spec_is_copied() -> None:
    when_imported(NAME, enter)
    spec: Any = copy.deepcopy(find_spec(NAME))
    assert spec.loader.get_filename(NAME).endswith("registry.py")
    assert not hasattr(spec.loader, "unheard_of")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TABLE == {"ours": True}


TORCHS_OWN = """
import importlib, sys
from torch import nn
import torch.nn.utils.fusion as fusion, torch.fx.experimental.optimization as optimization
sys.modules["captum.attr._core.deep_lift"] = None
import bnfast
assert "torch.ao.quantization.quantize_fx" not in sys.modules
model = nn.Sequential(nn.Conv2d(1, 2, 1), bnfast.BatchNorm2d(2)).eval()
assert len(list(optimization.fuse(model).children())) == 1
for module in (fusion, optimization):
    importlib.reload(module)
matches = optimization.matches_module_pattern
for function in (fusion.fuse_conv_bn_weights, fusion.fuse_linear_bn_weights, matches):
    assert function.__wrapped__.__module__ == function.__module__
    assert not hasattr(function.__wrapped__, "__wrapped__")
"""


def test_before_bnfast_in_a_new_process() -> None:
    """bnfast imports no library. (All other tests import what they test after it.)"""
    done = subprocess.run([sys.executable, "-c", TORCHS_OWN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
