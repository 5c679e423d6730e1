"""Blocks that bnfast.fuse fuses until something that their forward depends on changes, and these changes."""

from __future__ import annotations

import collections
import copy
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from tests.support import fused
from tests.support.fused import CHANNELS, CONV, Block, conv_norm_act, data, network, pair, tail, times
from tests.support.training import assert_same_training, record
from tests.support.versions import TORCH

SCALE = 2.0
ZERO = 0.0
SIZES = [1.0, 3.0]
NESTED = {"a": {"b": [2.0]}}
NAMED = collections.OrderedDict(scale=2.0)
CHOSEN = frozenset({"twice"})


class Settings:
    K = 2.0

    def __init__(self) -> None:
        self.scale, self.inner = 2.0, {"a": 1.0}

    def get(self, name: str) -> Any:
        return getattr(self, name)

    def of_class(self) -> float:
        return self.K

    @classmethod
    def from_class(cls) -> float:
        return cls.K


SETTINGS = Settings()
lookup = SETTINGS.get
module = sys.modules[__name__]


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


class Base(Block):
    K = scale = 2.0

    @classmethod
    def factor(cls) -> float:
        return cls.K

    @staticmethod
    def constant() -> float:
        return Base.K

    def tail(self, y: Tensor) -> Tensor:
        return F.relu(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.norm(x)) * Base.K * self.scale


class Derived(Base):
    def tail(self, y: Tensor) -> Tensor:
        return super().tail(y)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor() * self.constant() * super().K


class WithList(Base):
    def forward(self, x: Tensor, k: Any = SIZES) -> Tensor:
        return F.relu(self.norm(x)) * k[1]


class Inside(Base):
    """OpenMMLab's way: a property gives the layer by its name."""

    name = "norm"

    @property
    def chosen(self) -> nn.Module:
        return getattr(self, self.name)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.chosen(x))


class Chain(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Loop(nn.ModuleDict):
    """Calls one after another what `children` gives."""

    def __init__(self, children: Callable[[Any], Any], **modules: nn.Module) -> None:
        super().__init__(modules or dict(conv_norm_act().named_children()))
        self.called = children

    def forward(self, x: Tensor) -> Tensor:
        for child in self.called(self):
            x = child(x) * 2 if isinstance(child, nn.ReLU) else child(x)
        return x


AROUND, CHANGE_AROUND = fused.around(2.0)


def nested() -> Loop:
    return Loop(lambda b: b["groups"][0], groups=nn.ModuleList([nn.ModuleList(conv_norm_act())]))


def _imports(b: Any, y: Tensor, x: Tensor) -> Tensor:
    from tests.support.fused import FACTOR as factor

    return F.relu(y) * factor


def _alias(b: Any) -> float:
    kind = Settings
    return kind.K


class Change(NamedTuple):
    """A block, and a change of what its forward depends on: change(block, pytest's monkeypatch)."""

    make: fused.Make
    change: Callable[[Any, Any], object]
    left: int = 0  # the sites that are fused after the change


def sets(name: str, value: Any, holder: Any = None, child: str = "") -> Callable[[Any, Any], object]:
    """Sets an attribute of a holder or, without one, of the block or of a child of it."""

    def change(block: Any, patch: Any) -> None:
        patch.setattr(holder or block.get_submodule(child), name, value, raising=False)

    return change


def item(holder: Any, key: Any, value: Any) -> Callable[[Any, Any], object]:
    return lambda block, patch: holder.__setitem__(key, value)


def _untie(block: Any, patch: Any) -> None:
    block.second = bnfast.BatchNorm2d(CHANNELS).double()
    nn.init.constant_(block.second.weight, 3.0)


def _another_tail(block: Any, patch: Any) -> None:
    block.tail = types.MethodType(lambda self, y: torch.tanh(y), block)


def twice(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y * 2


def hook(child: str, kind: str, function: Callable[..., Any] = twice) -> Callable[[Any, Any], object]:
    return lambda block, patch: getattr(block.get_submodule(child), f"register_{kind}_hook")(function)


K3 = sets("K", 3.0, Settings)
SCALE3 = sets("SCALE", 3.0, module)
TRIPLE = sets("double", lambda y: y * 3, module)
MORE = sets("more", nn.Tanh())
TANH = sets("2", nn.Tanh())
SHARED = nn.BatchNorm2d(CHANNELS)
OPT_EINSUM = torch.backends.opt_einsum

# What lies outside the block.
OUTSIDE: dict[str, Change] = {
    "number": Change(times(lambda b: SCALE), SCALE3),
    "a number of another type": Change(times(lambda b: SCALE), sets("SCALE", 2, module)),
    "sign of zero": Change(times(lambda b: ZERO), sets("ZERO", -0.0, module)),
    "nested": Change(times(lambda b: NESTED["a"]["b"][0]), item(NESTED["a"]["b"], 0, 4.0)),
    "OrderedDict": Change(times(lambda b: NAMED["scale"]), item(NAMED, "scale", 4.0)),
    "set": Change(times(lambda b: 2 if "twice" in CHOSEN else 1), sets("CHOSEN", frozenset(), module)),
    "imported in a function": Change(tail(_imports), sets("FACTOR", 3.0, fused)),
    "function": Change(tail(lambda b, y, x: double(F.relu(y))), TRIPLE),
    "in a function": Change(tail(lambda b, y, x: scaled(F.relu(y))), SCALE3),
    "of a module": Change(times(lambda b: module.SCALE), SCALE3),
    "function of a module": Change(tail(lambda b, y, x: module.double(F.relu(y))), TRIPLE),
    "module": Change(times(lambda b: module.SCALE), sets("module", type("Fake", (), {"SCALE": 5.0}), module)),
    "attribute of an object's class": Change(times(lambda b: SETTINGS.K), K3),
    "attribute of its class": Change(times(lambda b: SETTINGS.of_class()), K3),
    "object": Change(times(lambda b: SETTINGS.get("scale")), sets("scale", 3.0, SETTINGS)),
    "inside an object": Change(times(lambda b: SETTINGS.get("inner")["a"]), item(SETTINGS.inner, "a", 3.0)),
    "bound method": Change(times(lambda b: lookup("scale")), sets("scale", 3.0, SETTINGS)),
    "attribute of a class": Change(times(lambda b: Settings.K), K3),
    "getattr of a class": Change(times(lambda b: getattr(Settings, "K")), K3),  # noqa: B009
    "class method": Change(times(lambda b: Settings.from_class()), K3),
    "class by another name": Change(times(_alias), K3),
    "attribute of a base": Change(Derived, sets("K", 3.0, Base)),
    "method of a base": Change(Derived, sets("tail", lambda self, y: torch.tanh(y), Base)),
    "forward of a base": Change(Derived, sets("forward", lambda self, x: x, Base)),
    "closure": Change(times(AROUND), lambda block, patch: CHANGE_AROUND(3.0)),
    "default": Change(WithList, item(SIZES, 1, 4.0)),
    "default of a function": Change(tail(lambda b, y, x: by_default(F.relu(y))), item(SIZES, 0, 4.0)),
    "keyword's default": Change(tail(lambda b, y, x: by_keyword(F.relu(y))), sets("scale", 3.0, SETTINGS)),
    "partial": Change(tail(lambda b, y, x: partly(F.relu(y))), item(SIZES, 0, 4.0)),
    "attribute of a function": Change(times(lambda b: by_default.factor), sets("factor", 4.0, by_default)),
    "torch's setting": Change(
        times(lambda b: 2 if OPT_EINSUM.enabled else 3), sets("enabled", not OPT_EINSUM.enabled, OPT_EINSUM)
    ),
}

# What belongs to the block.
INSIDE: dict[str, Change] = {
    "getattr with a default": Change(times(lambda b: getattr(b, "factor", 1)), sets("factor", 2)),
    "hasattr": Change(tail(lambda b, y, x: b.more(y) if hasattr(b, "more") else F.relu(y)), MORE),
    "sign of a zero in a tuple": Change(times(lambda b: b.zero[0], zero=(0.0,)), sets("zero", (-0.0,))),
    "named tuple": Change(times(lambda b: b.size[0], size=torch.Size([2])), sets("size", torch.Size([3]))),
    "slope": Change(lambda: conv_norm_act(nn.LeakyReLU(0.2)), sets("negative_slope", 0.5, child="2")),
    "identity": Change(lambda: nn.Sequential(*conv_norm_act()[:2], nn.Identity(), nn.ReLU()), TANH),
    "hook on a Sequential": Change(
        tail(lambda b, y, x: F.relu(b.second(x) + x), second=conv_norm_act()[:2]), hook("second", "forward")
    ),
    "method": Change(Base, _another_tail),
    "attribute of the class": Change(Base, sets("scale", 3)),
    "name of a method of torch's": Change(times(lambda b: b.half, half=2.0), sets("half", 0.5)),
    "Sequential": Change(lambda: Chain(*conv_norm_act()), MORE),
    "items": Change(lambda: Loop(lambda b: dict(b.items()).values()), MORE),
    "children": Change(lambda: Loop(lambda b: b.children()), MORE),
    "_modules": Change(lambda: Loop(lambda b: b._modules.values()), MORE),
    "shortcut that returns its input": Change(
        tail(fused.written_shortcut, other=nn.Sequential(nn.Conv2d(*CONV))),
        sets("0", nn.Identity(), child="other"),
    ),
    "hook on a shortcut": Change(
        tail(fused.written_shortcut, other=nn.Conv2d(*CONV)),
        hook("other", "forward", lambda module, args, y: args[0]),
    ),
    "shortcut appended": Change(
        tail(lambda b, y, x: F.relu(y + b.other(x)), other=nn.Sequential(nn.Conv2d(*CONV))),
        sets("more", nn.Tanh(), child="other"),
    ),
    "list in a list": Change(nested, lambda block, patch: block["groups"][0].append(nn.Tanh())),
    "class of a child": Change(nested, sets("2", nn.ReLU6(), child="groups.0")),
    "one of two names": Change(
        tail(lambda b, y, x: F.relu(b.second(F.relu(y) + 1)), norm=SHARED, second=SHARED), _untie
    ),
    "property": Change(Inside, sets("name", "conv")),
    "mode": Change(
        tail(lambda b, y, x: F.relu(y) if b.training else F.silu(y + x)), lambda block, patch: block.eval(), 1
    ),
    "parameter": Change(  # it is read anew with each call
        tail(lambda b, y, x: F.relu(y + b.z), z=nn.Parameter(torch.ones(3, 4, 4, 4))),
        lambda block, patch: setattr(block, "z", nn.Parameter(block.z * 2)),
        1,
    ),
    "hook on a layer": Change(network, hook("1.bn1", "forward"), 4),
    "hook on an activation": Change(network, hook("0.2", "forward_pre", lambda m, args: (args[0] + 1,)), 4),
    "backward hook": Change(network, hook("0.1", "full_backward", lambda m, dx, dy: (dx[0] * 2,)), 4),
    "backward pre-hook": Change(network, hook("0.1", "full_backward_pre", lambda m, dy: (dy[0] * 2,)), 4),
    "layer replaced": Change(network, sets("bn1", nn.InstanceNorm2d(CHANNELS), child="1"), 3),
    "layer replaced in a Sequential": Change(network, sets("1", nn.InstanceNorm2d(CHANNELS), child="0"), 4),
    "activation replaced": Change(network, sets("2", nn.Tanh(), child="0"), 4),
    "module appended": Change(network, sets("3", nn.Tanh(), child="0"), 4),
    "plain attribute": Change(network, sets("doubled", True, child="1"), 3),
    "child removed": Change(network, sets("downsample", None, child="2"), 3),
    "forward of the class replaced": Change(
        fused.Residual, sets("forward", lambda self, x: x * 3, fused.Residual)
    ),
    "forward replaced": Change(network, sets("forward", lambda x: x * 3, child="1"), 3),
}
CHANGES = OUTSIDE | INSIDE


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    put_back()


def put_back() -> None:
    """Undoes what the monkeypatch does not."""
    CHANGE_AROUND(2.0)
    SIZES[:] = [1.0, 3.0]
    NESTED["a"]["b"][:] = [2.0]
    NAMED["scale"], SETTINGS.inner["a"] = 2.0, 1.0


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, change, left = CHANGES[name]
    ours, theirs = pair(make)
    before = fused.fused_count(ours)
    assert before == 5 if make is network else 1 <= before <= 2
    assert_same_training(record(copy.deepcopy(ours), data()), record(copy.deepcopy(theirs), data()))
    change(ours, monkeypatch), change(theirs, monkeypatch)
    assert fused.fused_count(ours) == left
    if name in OUTSIDE:
        assert fused.reason(ours).endswith("which its block reads, has changed")
    assert_same_training(record(ours, data()), record(theirs, data()))
    if name in OUTSIDE:
        monkeypatch.undo()
        put_back()
        assert fused.fused_count(ours) == before


@pytest.mark.parametrize(
    "name",
    ["number", "nested", "function", "object", "attribute of a base", "closure", "default", "set", "partial"]
    + ["hasattr", "method", "list in a list", "one of two names", "property", "plain attribute", "mode"],
)
def test_compiles_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if TORCH < (2, 14) and name in ("attribute of a base", "default"):
        pytest.skip("2.11's Dynamo has no guards for what this reads")
    make, change, _ = CHANGES[name]
    ours, theirs = pair(make)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager" if make is network else "eager")
    torch.testing.assert_close(compiled(data()), theirs(data()))
    change(ours, monkeypatch), change(theirs, monkeypatch)
    torch.testing.assert_close(compiled(data()), theirs(data()))
