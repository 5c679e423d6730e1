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
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from tests.support.fusable_forms import add_in_place
from tests.support.fused import CHANNELS, Block, Make, conv_norm_act, tail, times


class Settings:
    K = 2.0


class WithAttributes(list[float]):
    k: float


class DictWithAttributes(dict[str, float]):
    k: float


SCALE = 2.0
TOTAL = 0
CALLS: list[int] = []
log = CALLS.append
SET = {"slope": 2.0}
get = SET.get
ENVIRONMENT = os.environ
FILE = sys.__stdin__
QUEUE = collections.deque([2.0])
VARIABLE = contextvars.ContextVar("VARIABLE", default=2.0)
ITEMS = WithAttributes([1.0])
PAIRS = DictWithAttributes(a=1.0)
ORDERED: Any = collections.OrderedDict(a=1.0)
ITEMS.k = PAIRS.k = ORDERED.k = 2.0


@functools.lru_cache
def cached() -> float:
    return Settings.K


cached()


def state() -> list[Any]:
    """Everything that the blocks below write to."""
    arrays = np.random.get_state()[1].tobytes()
    return [TOTAL, [*CALLS], dict(vars(Settings)), dict(vars(state)), random.getstate(), arrays]


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
    return nn.Sequential(collections.OrderedDict({"in": nn.BatchNorm2d(CHANNELS), "out": nn.ReLU()}))


# name: (block, words of the reason)
LEFT: dict[str, tuple[Make, str]] = {
    # What follows the layer is no activation, or something else is in the way.
    "no activation": (tail(lambda b, y, x: y), "its output is the block's"),
    "another module": (tail(lambda b, y, x: b.pool(y), pool=nn.MaxPool2d(2)), "MaxPool2d (pool) follows it"),
    "dropout": (tail(lambda b, y, x: F.relu(b.drop(y)), drop=nn.Dropout()), "Dropout"),
    "function between": (tail(lambda b, y, x: F.relu(F.dropout(y, 0.5, b.training))), "dropout"),
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
    "statistics before the add": (
        tail(lambda b, y, x: F.relu(y + x * b.norm.running_mean[0])), "forward reads norm.running_mean too",
    ),
    "other hardtanh": (tail(lambda b, y, x: F.hardtanh(y, -1, 1)), "hardtanh"),
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
    "torch.jit.isinstance": (asks(lambda x: torch.jit.isinstance(x, Tensor)), "its input"),
    "torch.is_tensor": (asks(torch.is_tensor), "asks for the type"),
    "is_lazy": (asks(nn.parameter.is_lazy), "asks for the type"),
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
    "os.environ": (times(lambda: float(os.environ.get("SCALE", 2.0))), "reads os.environ"),
    "os.getenv": (times(lambda: float(os.getenv("SCALE", "2"))), "calls os.getenv"),
    "environment by another name": (times(lambda: len(ENVIRONMENT)), "reads ENVIRONMENT"),
    "clock": (times(lambda: time.time() and 2), "calls time.time"),
    "clock by its name": (times(lambda: perf_counter() and 2), "calls perf_counter"),
    "clock held": (holds(time.monotonic, lambda clock: clock() and 2), "whose answer may change"),
    "date": (times(lambda: datetime.datetime.now().year), "calls datetime.datetime.now"),
    "recursion limit": (times(lambda: sys.getrecursionlimit()), "whose answer may change"),
    "file": (times(lambda: 1 + len(open(os.devnull).read())), "calls open"),  # noqa: SIM115
    "open file": (times(lambda: FILE and 1), "reads FILE"),
    "deque": (times(lambda: QUEUE[0]), "QUEUE, which is or holds a deque"),
    "all globals": (times(lambda: globals()["SCALE"]), "calls globals"),
    "all of a class": (times(lambda: Settings.__dict__["K"]), "Settings.__dict__"),
    "name computed": (times(lambda: getattr(Settings, (lambda: "K")())), "by a name that it computes"),
    "dict.get": (times(lambda: get("slope")), "get, which belongs to a dict"),
    "dict.get held": (holds(SET.get, lambda get: get("slope")), "get, which belongs to a dict"),
    "dict.get in a tuple": (holds((SET.get,), lambda held: held[0]("slope")), "get, which belongs to a dict"),
    "list.append": (times(lambda: log(1) or 2), "append, which belongs to a list"),
    "list.append held": (holds(CALLS.append, lambda log: log(1) or 2), "append, which belongs to a list"),
    "ContextVar.get": (times(lambda: VARIABLE.get()), "VARIABLE"),
    "ContextVar.get held": (holds(VARIABLE.get, lambda get: get()), "get, which belongs to a ContextVar"),
    "attribute of a list": (times(lambda: ITEMS.k), "a WithAttributes, which has attributes"),
    "attribute of a list held": (holds(ITEMS, lambda held: held.k), "which has attributes"),
    "attribute of a dict": (times(lambda: PAIRS.k), "a DictWithAttributes, which has attributes"),
    "attribute of an OrderedDict": (times(lambda: ORDERED.k), "a OrderedDict, which has attributes"),
    "attrgetter": (times(lambda: operator.attrgetter("K")(Settings)), "attrgetter"),
    "lru_cache": (times(lambda: cached()), "a _lru_cache_wrapper"),
    # It writes to what is not its own.
    "attribute of a class set by name": (times(lambda: setattr(Settings, "last", 1) or 2), "calls setattr"),
    "list held": (holds([0], lambda seen: seen.append(1) or 2), "writes to thing"),
    "list written": (times(lambda: CALLS.append(1) or 2), "writes to CALLS"),
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
