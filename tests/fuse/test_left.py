"""Blocks that bnfast.fuse leaves as they are, each with words of the reason."""

from __future__ import annotations

import collections
import contextvars
import datetime
import functools
import operator
import os
import random
import sys
import time
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from tests.support import fused
from tests.support.fused import Block, Make, add_in_place, conv_norm_act, data, pair, reason, tail, times
from tests.support.training import assert_same_training, record


class Settings:
    K = 2.0


SCALE = 2.0
read_around, change_around = fused.around(2.0)
TOTAL = 0
CALLS: list[int] = []
SET = {"slope": 2.0}
get = SET.get
ENVIRONMENT = os.environ
FILE = sys.__stdin__
QUEUE = collections.deque([2.0])
VARIABLE = contextvars.ContextVar("VARIABLE", default=2.0)
Returned = type("Returned", (nn.Conv2d,), {"forward": lambda self, x: x})
ITEMS: Any = type("WithAttributes", (list,), {})([1.0])
ORDERED: Any = collections.OrderedDict(a=1.0)
ITEMS.k = ORDERED.k = 2.0
cached = functools.lru_cache(lambda: Settings.K)
cached()


def state() -> list[Any]:
    """Everything that the blocks below write to."""
    drawn = random.getstate(), np.random.get_state()[1].tobytes()
    return [TOTAL, [*CALLS], read_around(None), dict(vars(Settings)), dict(vars(state)), *drawn]


def asks(question: Callable[[Tensor], Any]) -> Make:
    """A block that asks something about its input."""
    return tail(lambda b, y, x: F.relu(y) * (2 if question(x) else 3))


def holds(thing: Any, use: Callable[[Any], Any]) -> Make:
    """A block that uses something that it holds."""
    return tail(lambda b, y, x: F.relu(y) * use(b.thing), thing=thing)


def _hooked() -> nn.Module:
    module = conv_norm_act()
    module[2].register_forward_hook(lambda module, args, y: y + 1)
    return module


def _named_in() -> nn.Module:
    return nn.Sequential(collections.OrderedDict({"in": nn.BatchNorm2d(fused.CHANNELS), "out": nn.ReLU()}))


# name: (block, words of the reason)
LEFT: dict[str, tuple[Make, str]] = {
    # What follows the layer is no activation, or something else is in the way.
    "no activation": (tail(lambda b, y, x: y), "its output is the block's"),
    "another module": (tail(lambda b, y, x: b.pool(y), pool=nn.MaxPool2d(2)), "MaxPool2d (pool) follows it"),
    "hook": (_hooked, "(2) has hooks"),
    "another use": (tail(lambda b, y, x: F.relu(y) + y), "another use"),
    "itself added": (tail(lambda b, y, x: F.relu(y + y)), "no other tensor"),
    "number added": (tail(lambda b, y, x: F.relu(y + 1)), "no other tensor"),
    "scaled add": (tail(lambda b, y, x: F.relu(torch.add(y, x, alpha=2))), "scaled"),
    "added to its input": (tail(lambda b, y, x: F.relu(add_in_place(x * 1, y))), "in place"),
    "written before the add": (tail(lambda b, y, x: F.relu(y + (x * 2).mul_(3))), "may write in place"),
    "written as out": (
        tail(lambda b, y, x: F.relu(y + torch.mul(x.detach(), 3, out=x.detach() * 2))), "may write in place",
    ),
    "written after the add": (
        tail(lambda b, y, x: F.silu(y + (z := x * 2)) * z.mul_(3)), "may write to what was added",
    ),
    "added to what is used again": (
        tail(lambda b, y, x: F.relu(add_in_place(z := b.conv(x), y)) * z), "in place to a tensor",
    ),
    "added to what a convolution with a forward of its own returns": (
        tail(fused.written_shortcut, other=Returned(*fused.CONV)), "may write in place",
    ),
    "statistics before the add": (
        tail(lambda b, y, x: F.relu(y + x * b.norm.running_mean[0])), "forward reads norm.running_mean too",
    ),
    "other hardtanh": (tail(lambda b, y, x: F.hardtanh(y, -1, 1)), "hardtanh"),
    "other Identity": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), type("Other", (nn.Identity,), {})(), nn.ReLU()), "Other (1)",
    ),
    "other ReLU": (lambda: conv_norm_act(type("Other", (nn.ReLU,), {})()), "Other"),
    "keyword": (_named_in, "in is no name"),
    # The forward may take another path the next time.
    "random branch": (asks(lambda x: random.random() < 2), "random numbers"),
    "random choice": (asks(lambda x: random.choice([True])), "forward draws random numbers"),
    "NumPy's random branch": (asks(lambda x: np.random.rand() < 2), "random numbers"),
    "branch on grad mode": (asks(lambda x: torch.is_grad_enabled()), "grad mode"),
    "branch on autocast": (asks(lambda x: torch.is_autocast_enabled("cpu")), "autocast"),
    "branch on a value": (asks(lambda x: x.sum() > 0), "branches on a tensor, or on something of one"),
    "branch on a tensor held": (holds(torch.ones(()), lambda limit: 2 if limit > 0 else 3), "of its own"),
    "checkpointed": (
        tail(lambda b, y, x: checkpoint(lambda t: F.relu(t + x), y, use_reentrant=False)),
        "torch.utils.checkpoint asks for the type",
    ),
    "checkpointed, reentrant": (
        tail(lambda b, y, x: checkpoint(lambda t: F.relu(t + x), y, use_reentrant=True)), "left as it is",
    ),
    "tensor made": (tail(lambda b, y, x: F.relu(y) * torch.ones(1)), "a tensor of its own"),
    "tensor made like another": (
        tail(lambda b, y, x: F.relu(y) + torch.zeros(1, device=x.device)),
        "forward gives torch.zeros something of its input, which torch.fx does not record there",
    ),
    # It would have another answer for a symbol, or for a subclass.
    "type of its input": (asks(lambda x: isinstance(x, Tensor)), "forward asks for the type of its input"),
    "type of itself": (tail(lambda b, y, x: F.relu(y) if type(b) is Block else y), "asks for the type"),
    "class of a child": (holds(nn.Tanh(), lambda held: held.__class__ is nn.Tanh), "asks for the type"),
    "kind of a size": (asks(lambda x: isinstance(x.ndim, int)), "type of"),
    "attribute of its input": (asks(lambda x: hasattr(x, "mark")), "mark"),
    "gradient of its input": (asks(lambda x: x.grad is None), "grad"),
    "tree_map_only": (
        tail(lambda b, y, x: pytree.tree_map_only(Tensor, lambda t: t * 2, {"y": F.relu(y)})["y"]),
        "asks for the type",
    ),
    "torch.is_tensor": (asks(torch.is_tensor), "asks for the type"),
    "Parameter": (asks(lambda x: isinstance(x, nn.Parameter)), "asks for the type"),
    "callable": (asks(lambda x: callable(x)), "asks whether something is callable"),
    "has_torch_function": (asks(lambda x: torch.overrides.has_torch_function((x,))), "which tells symbols"),
    "repr": (asks(lambda x: "Proxy" in repr(x)), "for __repr__"),
    "str": (asks(lambda x: "Proxy" in str(x)), "for __"),
    "format": (asks(lambda x: f"{x}" == "x"), "for __format__"),
    # It reads what no guard can follow.
    "all parameters": (tail(lambda b, y, x: F.relu(y.to(next(b.parameters()).dtype))), "parameters"),
    "vars": (tail(lambda b, y, x: F.relu(y) if vars(b) else y), "calls vars"),
    "__dict__": (tail(lambda b, y, x: F.relu(y) if b.__dict__ else y), "asks for __dict__"),
    "forward by its name": (tail(lambda b, y, x: F.relu(b.conv.forward(y))), "asks for forward"),
    "settings": (holds(Settings, lambda cfg: cfg.K), "reads thing"),
    "os.environ": (times(lambda b: float(os.environ.get("SCALE", 2.0))), "reads os.environ"),
    "os.getenv": (times(lambda b: float(os.getenv("SCALE", "2"))), "calls os.getenv"),
    "environment by another name": (times(lambda b: len(ENVIRONMENT)), "reads ENVIRONMENT"),
    "clock": (times(lambda b: time.time() and 2), "calls time.time"),
    "clock by its name": (times(lambda b: perf_counter() and 2), "calls perf_counter"),
    "clock held": (holds(time.monotonic, lambda clock: clock() and 2), "whose answer may change"),
    "date": (times(lambda b: datetime.datetime.now().year), "calls datetime.datetime.now"),
    "recursion limit": (times(lambda b: sys.getrecursionlimit()), "whose answer may change"),
    "file": (times(lambda b: 1 + len(open(os.devnull).read())), "calls open"),  # noqa: SIM115
    "open file": (times(lambda b: FILE and 1), "reads FILE"),
    "deque": (times(lambda b: QUEUE[0]), "QUEUE, which is or holds a deque"),
    "all globals": (times(lambda b: globals()["SCALE"]), "calls globals"),
    "all of a class": (times(lambda b: Settings.__dict__["K"]), "Settings.__dict__"),
    "name computed": (times(lambda b: getattr(Settings, (lambda: "K")())), "by a name that it computes"),
    "dict.get": (times(lambda b: get("slope")), "get, which belongs to a dict"),
    "dict.get held": (holds(SET.get, lambda get: get("slope")), "get, which belongs to a dict"),
    "dict.get in a tuple": (holds((SET.get,), lambda held: held[0]("slope")), "get, which belongs to a dict"),
    "ContextVar.get": (times(lambda b: VARIABLE.get()), "VARIABLE"),
    "attribute of a list": (times(lambda b: ITEMS.k), "a WithAttributes, which has attributes"),
    "attribute of a list held": (holds(ITEMS, lambda held: held.k), "which has attributes"),
    "attribute of an OrderedDict": (times(lambda b: ORDERED.k), "a OrderedDict, which has attributes"),
    "attrgetter": (times(lambda b: operator.attrgetter("K")(Settings)), "attrgetter"),
    "lru_cache": (times(lambda b: cached()), "a _lru_cache_wrapper"),
    "class that copies itself": (
        type("Own", (Block,), {"__getstate__": lambda self: self.__dict__}), "Own is copied or pickled in",
    ),
    # It writes to what is not its own.
    "variable of a function written": (times(lambda b: change_around(3.0) or 2), "writes to factor"),
    "attribute of a class set by name": (times(lambda b: setattr(Settings, "last", 1) or 2), "calls setattr"),
    "list held": (holds([0], lambda seen: seen.append(1) or 2), "writes to thing"),
    "list written": (times(lambda b: CALLS.append(1) or 2), "writes to CALLS"),
}  # fmt: skip


def left(words: str) -> Callable[[Callable[..., Any]], None]:
    """Enters a tail that is no single expression in the table, under its name."""

    def enter(function: Callable[..., Any]) -> None:
        LEFT[function.__name__] = tail(function), words

    return enter


@left("grad mode")
def part_without_grad(b: Any, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.sigmoid()
    return F.relu(y) * gate


@left("branches on")
def error_caught(b: Any, y: Tensor, x: Tensor) -> Tensor:
    try:
        factor = 2 if x.shape[0] > 1 else 3
    except Exception:
        factor = 1
    return F.relu(y) * factor


@left("NOT_DEFINED, which is not defined")
def name_that_is_not_defined(b: Any, y: Tensor, x: Tensor) -> Tensor:
    try:
        return F.relu(y) * NOT_DEFINED  # type: ignore[name-defined]
    except NameError:
        return F.relu(y) * 2


@left("sets last")
def attribute_set(b: Any, y: Tensor, x: Tensor) -> Tensor:
    b.last = y
    return F.relu(y)


@left("sets mark")
def attribute_of_a_tensor_set(b: Any, y: Tensor, x: Tensor) -> Tensor:
    y.mark = 1  # type: ignore[attr-defined]
    return F.relu(y)


@left("writes to TOTAL")
def global_written(b: Any, y: Tensor, x: Tensor) -> Tensor:
    global TOTAL
    TOTAL += 1
    return F.relu(y)


@left("writes to Settings.K")
def class_written(b: Any, y: Tensor, x: Tensor) -> Tensor:
    Settings.K += 1
    return F.relu(y)


@left("writes to Settings.last")
def attribute_of_a_class_set(b: Any, y: Tensor, x: Tensor) -> Tensor:
    Settings.last = y  # type: ignore[attr-defined]
    return F.relu(y)


@left("writes to state.last")
def attribute_of_a_function_set(b: Any, y: Tensor, x: Tensor) -> Tensor:
    state.last = y  # type: ignore[attr-defined]
    return F.relu(y)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("name", LEFT)
def test_leaves(name: str, calls: list[tuple[str | None, bool]]) -> None:
    make, words = LEFT[name]
    before = state()
    ours, theirs = pair(make)
    found = reason(ours)
    assert words in found
    assert state() == before
    assert {n: v for n, v in vars(ours).items() if n[0] != "_"} == {
        n: v for n, v in vars(theirs).items() if n[0] != "_"
    }
    assert type(ours) is type(theirs)
    assert_same_training(record(ours, data()), record(theirs, data()))
    assert calls == 3 * [(None, False)]
