"""Blocks whose class, or whose children's, is out of the ordinary."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bnfast
from tests.support.block_forms import CHANNELS, Block, conv_norm_act
from tests.support.fused import data, fused_count, pair
from tests.support.training import assert_same_training, record

pytestmark = pytest.mark.usefixtures("plain_torch")


class Registered(nn.Module):
    """Subclasses of it are known by name, and have to be new."""

    known: dict[str, type] = {}

    def __init_subclass__(cls) -> None:
        if cls.__name__ in Registered.known:
            raise ValueError(f"{cls.__name__} is known")
        Registered.known[cls.__name__] = cls


class InRegister(Registered):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class _Meta(type):
    made: list[str] = []

    def __init__(cls, name: str, *rest: Any) -> None:
        super().__init__(name, *rest)
        _Meta.made.append(name)


class OfMeta(nn.Module, metaclass=_Meta):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class Closed(Block):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("closed")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


@pytest.mark.parametrize("make", [InRegister, OfMeta, Closed])
def test_classes_that_watch_over_themselves(make: type[nn.Module]) -> None:
    known, made = dict(Registered.known), list(_Meta.made)
    ours, theirs = pair(make)
    assert fused_count(ours) == 1
    assert fused_count(pickle.loads(pickle.dumps(ours))) == 1
    assert (Registered.known, _Meta.made) == (known, made)
    assert_same_training(record(ours, data()), record(theirs, data()))
    assert type(bnfast.unfuse(ours)) is make


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "how", [torch.jit.script, lambda m: torch.jit.trace(m, data())], ids=["script", "trace"]
)
def test_beside_compiled_children(how: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    theirs = conv_norm_act().double()
    expected = record(copy.deepcopy(theirs), data())
    theirs[0] = how(theirs[0])
    ours = bnfast.fuse(theirs)
    assert fused_count(ours) == 1
    assert_same_training(record(ours, data()), expected)


def test_copies_of_what_holds_itself() -> None:
    model = conv_norm_act()
    model.everything = [model]  # type: ignore[assignment]
    copied = copy.deepcopy(bnfast.fuse(model))
    assert copied.everything[0] is copied
    assert copied is not model


def test_compiled_in_place_and_copied() -> None:
    """torch's modules leave what was compiled behind, for it calls the first."""
    model = bnfast.fuse(conv_norm_act()).double().eval()
    model.compile(backend="eager")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nn.init.zeros_(copied[0].weight)
        assert torch.equal(copied(data()), torch.zeros(3, CHANNELS, 4, 4, dtype=torch.float64))


def _with_offset(block: Any, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) + block.offset


def test_parametrized_since_and_pickled() -> None:
    model = Block(_with_offset)
    model.offset = nn.Parameter(torch.ones(1))
    bnfast.fuse(model)
    parametrize.register_parametrization(model, "offset", nn.Identity())
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(model)
