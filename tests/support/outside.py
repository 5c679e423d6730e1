"""What blocks in tests read beside their inputs and themselves, and the blocks that do."""

from __future__ import annotations

import collections
import datetime
import functools
import os
import sys
import time
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.block_forms import CHANNELS, Block

SCALE = 2.0
FLAG = True
SIZES = [1.0, 3.0]
NESTED = {"a": {"b": [2.0]}}
NAMED = collections.OrderedDict(scale=2.0)
CHOSEN = frozenset({"twice"})
ENVIRONMENT = os.environ
FILE = sys.__stdin__
QUEUE = collections.deque([2.0])
TOTAL = 0
CALLS: list[int] = []


class Settings:
    K = 2.0

    def __init__(self) -> None:
        self.scale, self.inner = 2.0, {"more": 1.0}

    def get(self, name: str) -> Any:
        return getattr(self, name)

    def of_class(self) -> float:
        return self.K

    @classmethod
    def from_class(cls) -> float:
        return cls.K


SETTINGS = Settings()


def double(y: Tensor) -> Tensor:
    return y * 2


def scaled(y: Tensor) -> Tensor:
    return y * SCALE


def by_default(y: Tensor, k: Any = SIZES) -> Tensor:
    return y * k[0]


def by_keyword(y: Tensor, *, k: Any = SETTINGS) -> Tensor:
    return y * k.scale


partly = functools.partial(by_default, k=SIZES)
by_default.factor = 2.0  # type: ignore[attr-defined]
module = sys.modules[__name__]
lookup = SETTINGS.get


class Base(nn.Module):
    K = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def tail(self, y: Tensor) -> Tensor:
        return F.relu(y)

    @classmethod
    def factor(cls) -> float:
        return cls.K

    @staticmethod
    def constant() -> float:
        return Base.K

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.norm(x)) * Base.K


class Derived(Base):
    def tail(self, y: Tensor) -> Tensor:
        return super().tail(y)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor() * self.constant() * super().K


class WithList(Base):
    def forward(self, x: Tensor, k: Any = SIZES) -> Tensor:
        return F.relu(self.norm(x)) * k[1]


def around(factor: float) -> tuple[Callable[..., Tensor], Callable[[float], None]]:
    """A function with a variable around it, two functions away, and one that sets the variable."""

    def middle() -> Callable[..., Tensor]:
        def tail(b: Any, y: Tensor, x: Tensor) -> Tensor:
            return F.relu(y) * (lambda: factor)()

        return tail

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return middle(), change


AROUND, CHANGE_AROUND = around(2.0)


def _counts(b: Any, y: Tensor, x: Tensor) -> Tensor:
    global TOTAL
    TOTAL += 1
    return F.relu(y)


def _appends(b: Any, y: Tensor, x: Tensor) -> Tensor:
    CALLS.append(1)
    return F.relu(y)


def _class_counts(b: Any, y: Tensor, x: Tensor) -> Tensor:
    Base.K += 1
    return F.relu(y)


def _sets(b: Any, y: Tensor, x: Tensor) -> Tensor:
    Settings.last = y  # type: ignore[attr-defined]
    return F.relu(y)


def _imports(b: Any, y: Tensor, x: Tensor) -> Tensor:
    from tests.support.outside import SCALE as factor

    return F.relu(y) * factor


def _alias(b: Any, y: Tensor, x: Tensor) -> Tensor:
    kind = Settings
    return F.relu(y) * kind.K


def _reads_file(b: Any, y: Tensor, x: Tensor) -> Tensor:
    with open(os.devnull) as file:
        return F.relu(y) * (1 + len(file.read()))


def times(factor: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Block(lambda b, y, x: F.relu(y) * factor())


Patch = Callable[[Any], None]  # with pytest's monkeypatch


def _set(name: str, value: Any) -> Patch:
    return lambda patch: patch.setattr(module, name, value)


def _item(holder: Any, key: Any, value: Any) -> Patch:
    return lambda patch: holder.__setitem__(key, value)


def _attribute(holder: Any, name: str, value: Any) -> Patch:
    return lambda patch: patch.setattr(holder, name, value)


def _change_around(patch: Any) -> None:
    CHANGE_AROUND(3.0)


def put_back() -> None:
    """What the monkeypatch does not."""
    CHANGE_AROUND(2.0)
    SIZES[:] = [1.0, 3.0]
    NESTED["a"]["b"][:] = [2.0]
    NAMED["scale"], SETTINGS.inner["more"] = 2.0, 1.0


# name: (block, a change of what it reads). All are fused before the change, and none is after.
GUARDED: dict[str, tuple[Callable[[], nn.Module], Patch]] = {
    "number": (times(lambda: SCALE), _set("SCALE", 3.0)),
    "a number of another type": (times(lambda: SCALE), _set("SCALE", 2)),
    "flag": (times(lambda: 2 if FLAG else 3), _set("FLAG", False)),
    "list": (times(lambda: SIZES[1]), _item(SIZES, 1, 4.0)),
    "nested": (times(lambda: NESTED["a"]["b"][0]), _item(NESTED["a"]["b"], 0, 4.0)),
    "OrderedDict": (times(lambda: NAMED["scale"]), _item(NAMED, "scale", 4.0)),
    "set": (times(lambda: 2 if "twice" in CHOSEN else 1), _set("CHOSEN", frozenset())),
    "imported in a function": (lambda: Block(_imports), _set("SCALE", 3.0)),
    "function": (lambda: Block(lambda b, y, x: double(F.relu(y))), _set("double", lambda y: y * 3)),
    "in a function": (lambda: Block(lambda b, y, x: scaled(F.relu(y))), _set("SCALE", 3.0)),
    "of a module": (times(lambda: module.SCALE), _set("SCALE", 3.0)),
    "function of a module": (
        lambda: Block(lambda b, y, x: module.double(F.relu(y))), _set("double", lambda y: y * 3),
    ),
    "module": (times(lambda: module.SCALE), _set("module", type("Fake", (), {"SCALE": 5.0}))),
    "attribute of an object": (times(lambda: SETTINGS.scale), _attribute(SETTINGS, "scale", 3.0)),
    "attribute of an object's class": (times(lambda: SETTINGS.K), _attribute(Settings, "K", 3.0)),
    "attribute of its class": (times(lambda: SETTINGS.of_class()), _attribute(Settings, "K", 3.0)),
    "object": (times(lambda: SETTINGS.get("scale")), _attribute(SETTINGS, "scale", 3.0)),
    "inside an object": (times(lambda: SETTINGS.get("inner")["more"]), _item(SETTINGS.inner, "more", 3.0)),
    "bound method": (times(lambda: lookup("scale")), _attribute(SETTINGS, "scale", 3.0)),
    "attribute of a class": (times(lambda: Settings.K), _attribute(Settings, "K", 3.0)),
    "getattr of a class": (times(lambda: getattr(Settings, "K")), _attribute(Settings, "K", 3.0)),  # noqa: B009
    "class method": (times(lambda: Settings.from_class()), _attribute(Settings, "K", 3.0)),
    "class by another name": (lambda: Block(_alias), _attribute(Settings, "K", 3.0)),
    "attribute of a base": (Derived, _attribute(Base, "K", 3.0)),
    "method of a base": (Derived, _attribute(Base, "tail", lambda self, y: torch.tanh(y))),
    "forward of a base": (Derived, _attribute(Base, "forward", lambda self, x: x)),
    "closure": (lambda: Block(AROUND), _change_around),
    "default": (WithList, _item(SIZES, 1, 4.0)),
    "default of a function": (lambda: Block(lambda b, y, x: by_default(F.relu(y))), _item(SIZES, 0, 4.0)),
    "keyword's default": (
        lambda: Block(lambda b, y, x: by_keyword(F.relu(y))), _attribute(SETTINGS, "scale", 3.0),
    ),
    "partial": (lambda: Block(lambda b, y, x: partly(F.relu(y))), _item(SIZES, 0, 4.0)),
    "attribute of a function": (times(lambda: by_default.factor), _attribute(by_default, "factor", 4.0)),
    "torch's setting": (
        times(lambda: 2 if torch.backends.opt_einsum.enabled else 3),
        _attribute(torch.backends.opt_einsum, "enabled", not torch.backends.opt_einsum.enabled),
    ),
}  # fmt: skip

# name: (block, words of the reason)
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "os.environ": (times(lambda: float(os.environ.get("SCALE", 2.0))), "reads os.environ"),
    "os.getenv": (times(lambda: float(os.getenv("SCALE", "2"))), "calls os.getenv"),
    "environment by another name": (times(lambda: len(ENVIRONMENT)), "reads ENVIRONMENT"),
    "clock": (times(lambda: time.time()), "calls time.time"),
    "clock by its name": (times(lambda: perf_counter()), "calls perf_counter"),
    "date": (times(lambda: datetime.datetime.now().year), "calls datetime.datetime.now"),
    "file": (lambda: Block(_reads_file), "calls open"),
    "open file": (times(lambda: FILE and 1), "reads FILE"),
    "deque": (times(lambda: QUEUE[0]), "QUEUE, which is or holds a deque"),
    "global written": (lambda: Block(_counts), "writes to TOTAL"),
    "list written": (lambda: Block(_appends), "writes to CALLS"),
    "class written": (lambda: Block(_class_counts), "writes to Base.K"),
    "attribute of a class set": (lambda: Block(_sets), "writes to Settings.last"),
    "all globals": (times(lambda: globals()["SCALE"]), "calls globals"),
    "all of a class": (times(lambda: Settings.__dict__["K"]), "Settings.__dict__"),
    "name computed": (times(lambda: getattr(Settings, (lambda: "K")())), "by a name that it computes"),
}  # fmt: skip
