"""What a forward depends on beside its inputs: once that changes, or where no guard could see it change, the
original forward runs."""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfast
from tests.support.block_forms import CHANNELS, Block, conv_norm_act
from tests.support.fused import data, fused_count, pair
from tests.support.training import assert_same_training, record

pytestmark = pytest.mark.usefixtures("plain_torch")


class Methods(Block):
    factor = 2

    def tail(self, y: Tensor) -> Tensor:
        return F.relu(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.norm(self.conv(x))) * self.factor


class Chain(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def _through(children: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    """A block that calls one after another what `children` gives."""

    class Loop(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            for child in children(self):
                x = child(x)
            return x

    return lambda: Loop(dict(conv_norm_act().named_children()))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList([nn.ModuleList(conv_norm_act())])

    def forward(self, x: Tensor) -> Tensor:
        for child in self.groups[0]:
            x = child(x) * 2 if isinstance(child, nn.ReLU) else child(x)
        return x


class SameTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x)) + 1))


class Inside(nn.Module):
    """OpenMMLab's way: a property gives the layer by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.bn1 = "bn1", nn.BatchNorm2d(CHANNELS)

    @property
    def norm(self) -> nn.Module:
        return getattr(self, self.name)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


def _untie(model: Any) -> None:
    model.second = bnfast.BatchNorm2d(CHANNELS).double()
    nn.init.constant_(model.second.weight, 3.0)


def _another_tail(model: Any) -> None:
    model.tail = types.MethodType(lambda self, y: torch.tanh(y), model)


def _tanh_between(model: Any) -> None:
    model[1] = nn.Tanh()


def _double_second(model: Any) -> None:
    model.second.register_forward_hook(lambda module, args, y: y * 2)


def _another_name(model: Any) -> None:
    model.bn2, model.name = nn.InstanceNorm2d(CHANNELS), "bn2"


def _with(name: str, value: Any, tail: Callable[..., Tensor]) -> nn.Module:
    block = Block(tail)
    setattr(block, name, value)
    return block


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, name, value)


# name: (block, change that the rewritten forward must not pass over)
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None]]] = {
    "getattr with a default": (
        lambda: Block(lambda b, y, x: F.relu(y) * getattr(b, "factor", 1)), _set("factor", 2),
    ),
    "hasattr": (
        lambda: Block(lambda b, y, x: F.relu(b.extra(y) if hasattr(b, "extra") else y)),
        _set("extra", nn.Tanh()),
    ),
    "slope": (lambda: conv_norm_act(nn.LeakyReLU(0.2)), lambda m: setattr(m[2], "negative_slope", 0.5)),
    "identity": (lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.Identity(), nn.ReLU()), _tanh_between),
    "hook on a Sequential": (
        lambda: Block(lambda b, y, x: F.relu(b.second(x) + x), second=conv_norm_act()[:2]), _double_second,
    ),
    "method": (Methods, _another_tail),
    "attribute of the class": (Methods, _set("factor", 3)),
    "name of a method of torch's": (
        lambda: _with("half", 2.0, lambda b, y, x: F.relu(y) * b.half), _set("half", 0.5),
    ),
    "Sequential": (lambda: Chain(*conv_norm_act()), lambda m: m.append(nn.Tanh())),
    "items": (_through(lambda b: dict(b.items()).values()), _set("more", nn.Tanh())),
    "children": (_through(lambda b: b.children()), _set("more", nn.Tanh())),
    "_modules": (_through(lambda b: b._modules.values()), _set("more", nn.Tanh())),
    "list in a list": (Nested, lambda m: m.groups[0].append(nn.Tanh())),
    "class of a child": (Nested, lambda m: m.groups[0].__setitem__(2, nn.ReLU6())),
    "one of two names": (SameTwice, _untie),
    "property": (Inside, _another_name),
    "named tuple": (
        lambda: _with("sizes", torch.Size([2, 3]), lambda b, y, x: F.relu(y) * b.sizes[0]),
        _set("sizes", torch.Size([3, 3])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str) -> None:
    make, change = CHANGES[name]
    ours, theirs = pair(make)
    before = fused_count(ours)
    assert before > 0
    assert_same_training(record(copy.deepcopy(ours), data()), record(copy.deepcopy(theirs), data()))
    change(ours), change(theirs)
    assert fused_count(ours) == 0
    assert_same_training(record(ours, data()), record(theirs, data()))


def _type_of_itself(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) if type(block) is Block else y


def _type_of_a_child(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) if block.conv.__class__ is nn.Conv2d else y


def _caught(block: Any, y: Tensor, x: Tensor) -> Tensor:
    try:
        factor = 2 if x.shape[0] > 1 else 3
    except Exception:
        factor = 1
    return F.relu(y) * factor


def _marked(block: Any, y: Tensor, x: Tensor) -> Tensor:
    z = F.relu(y)
    z.mark = 1  # type: ignore[attr-defined]
    return z


def _in_autocast(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) if torch.is_autocast_enabled("cpu") else y


def _statistics(block: Any, y: Tensor, x: Tensor) -> Tensor:
    scale = block.norm.running_mean * 2
    return F.relu(y + x) * scale.view(1, -1, 1, 1)


def _named_in() -> nn.Module:
    return nn.Sequential(collections.OrderedDict({"in": nn.BatchNorm2d(CHANNELS), "out": nn.ReLU()}))


# name: (block, words of the reason)
NOT_FUSABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "type of itself": (lambda: Block(_type_of_itself), "asks for the type"),
    "class of a child": (lambda: Block(_type_of_a_child), "asks for the type"),
    "error caught": (lambda: Block(_caught), "branches on"),
    "attribute of its input": (lambda: Block(lambda b, y, x: F.relu(y) if hasattr(x, "mark") else y), "mark"),
    "gradient of its input": (lambda: Block(lambda b, y, x: F.relu(y) if x.grad is None else y), "grad"),
    "kind of a size": (lambda: Block(lambda b, y, x: F.relu(y) if isinstance(x.ndim, int) else y), "type of"),
    "attribute set on a tensor": (lambda: Block(_marked), "sets mark"),
    "all parameters": (lambda: Block(lambda b, y, x: F.relu(y.to(next(b.parameters()).dtype))), "parameters"),
    "vars": (lambda: Block(lambda b, y, x: F.relu(y) if vars(b) else y), "__dict__"),
    "forward by its name": (lambda: Block(lambda b, y, x: F.relu(b.conv.forward(y))), "asks for forward"),
    "value of a tensor": (
        lambda: _with("limit", torch.ones(()), lambda b, y, x: F.relu(y) if b.limit > 0 else y), "of its own",
    ),
    "settings": (
        lambda: _with("cfg", type("Cfg", (), {"s": 2}), lambda b, y, x: F.relu(y) * b.cfg.s), "reads cfg",
    ),
    "autocast": (lambda: Block(_in_autocast), "autocast"),
    "NumPy's random numbers": (
        lambda: Block(lambda b, y, x: F.relu(y) if np.random.rand() < 2 else y), "random numbers",
    ),
    "statistics before the add": (lambda: Block(_statistics), "reads norm.running_mean too"),
    "keyword": (_named_in, "in is no name"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FUSABLE)
def test_leaves(name: str) -> None:
    make, words = NOT_FUSABLE[name]
    arrays = np.random.get_state()[1].tobytes()
    ours, theirs = pair(make)
    assert np.random.get_state()[1].tobytes() == arrays
    (skipped,) = bnfast.fusion_report(ours).skipped
    assert words in skipped.reason
    assert type(ours) is type(theirs)
    assert_same_training(record(ours, data()), record(theirs, data()))


class Kept(dict):  # type: ignore[type-arg]
    """Not known to torch.fx."""


@pytest.mark.parametrize(("kind", "fused"), [(dict, 1), (collections.OrderedDict, 1), (Kept, 0)])
def test_outputs_stay_of_their_kind(kind: type, fused: int) -> None:
    ours, theirs = pair(lambda: Block(lambda b, y, x: kind(out=F.relu(y), input=x)))
    assert fused_count(ours) == fused
    assert_same_training(record(ours, data()), record(theirs, data()))
    output = ours(data())
    assert type(output) is kind
    assert list(output) == ["out", "input"]


@pytest.mark.parametrize("name", ["hasattr", "method", "list in a list", "one of two names", "property"])
def test_compiles_in_one_graph(name: str) -> None:
    ours, theirs = pair(CHANGES[name][0])
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(data()), theirs(data()))
