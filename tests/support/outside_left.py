"""Blocks that ask helpers about a symbol, or hold and read what may change unseen: all of them are left."""

from __future__ import annotations

import collections
import contextvars
import functools
import operator
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.support.block_forms import Block

SET = {"slope": 2.0}
get = SET.get
LOG: list[int] = []
log = LOG.append
VARIABLE = contextvars.ContextVar("VARIABLE", default=2.0)


class WithAttributes(list[float]):
    k: float


class DictWithAttributes(dict[str, float]):
    k: float


ITEMS = WithAttributes([1.0])
PAIRS = DictWithAttributes(a=1.0)
ORDERED: Any = collections.OrderedDict(a=1.0)
ITEMS.k = PAIRS.k = ORDERED.k = 2.0


class Settings:
    K = 2.0


@functools.lru_cache
def cached() -> float:
    return Settings.K


cached()


def _missing() -> float:
    try:
        return NOT_DEFINED  # type: ignore[name-defined, no-any-return]
    except NameError:
        return 2.0


def asks(question: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Block(lambda b, y, x: F.relu(y) * (2 if question(x) else 3))


def reads(factor: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Block(lambda b, y, x: F.relu(y) * factor())


def holds(thing: Any, use: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = Block(lambda b, y, x: F.relu(y) * use(b.thing))
        block.thing = thing
        return block

    return make


def _doubles_tensors(b: Any, y: Tensor, x: Tensor) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t * 2, {"y": F.relu(y)})["y"]


# name: (block, words of the reason)
TYPES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tree_map_only": (lambda: Block(_doubles_tensors), "asks for the type"),
    "torch.jit.isinstance": (asks(lambda x: torch.jit.isinstance(x, Tensor)), "its input"),
    "torch.is_tensor": (asks(torch.is_tensor), "asks for the type"),
    "is_lazy": (asks(nn.parameter.is_lazy), "asks for the type"),
    "Parameter": (asks(lambda x: isinstance(x, nn.Parameter)), "asks for the type"),
    "callable": (asks(lambda x: callable(x)), "asks whether something is callable"),
    "has_torch_function": (
        asks(lambda x: torch.overrides.has_torch_function((x,))), "has_torch_function, which tells",
    ),
    "repr": (asks(lambda x: "Proxy" in repr(x)), "for __repr__"),
    "str": (asks(lambda x: "Proxy" in str(x)), "for __"),
    "format": (asks(lambda x: f"{x}" == "x"), "for __format__"),
}  # fmt: skip
UNSEEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dict.get": (reads(lambda: get("slope")), "get, which belongs to a dict"),
    "dict.get held": (holds(SET.get, lambda get: get("slope")), "get, which belongs to a dict"),
    "dict.get in a tuple": (holds((SET.get,), lambda held: held[0]("slope")), "get, which belongs to a dict"),
    "list.append": (reads(lambda: log(1) or 2), "append, which belongs to a list"),
    "list.append held": (holds(LOG.append, lambda log: log(1) or 2), "append, which belongs to a list"),
    "ContextVar.get": (reads(lambda: VARIABLE.get()), "VARIABLE"),
    "ContextVar.get held": (holds(VARIABLE.get, lambda get: get()), "get, which belongs to a ContextVar"),
    "clock held": (holds(time.monotonic, lambda clock: clock() and 2), "whose answer may change"),
    "attribute of a list": (reads(lambda: ITEMS.k), "a WithAttributes, which has attributes"),
    "attribute of a dict": (reads(lambda: PAIRS.k), "a DictWithAttributes, which has attributes"),
    "attribute of an OrderedDict": (reads(lambda: ORDERED.k), "a OrderedDict, which has attributes"),
    "attribute of a list held": (holds(ITEMS, lambda held: held.k), "which has attributes"),
    "attrgetter": (reads(lambda: operator.attrgetter("K")(Settings)), "attrgetter"),
    "lru_cache": (reads(lambda: cached()), "a _lru_cache_wrapper"),
    "name that is not defined": (reads(lambda: _missing()), "NOT_DEFINED, which is not defined"),
    "recursion limit": (reads(lambda: sys.getrecursionlimit()), "whose answer may change"),
}  # fmt: skip
