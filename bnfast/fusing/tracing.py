"""Traces one block's forward to a torch.fx graph whose leaves are the modules in it, and records its
dependencies."""

from __future__ import annotations

import contextlib
import inspect
import keyword
import random
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from .guards import Condition, Shared, children, is_sequence, original_class, path_of
from .observing import Seen, observed
from .symbols import Symbol
from .values import Refusal
from .watching import Reads, watched


class Traced(NamedTuple):
    graph: Graph
    parameters: tuple[str, ...]  # the tensors that forward takes
    guards: tuple[Condition, ...]


def trace(block: nn.Module, inlined: set[nn.Module]) -> Traced:
    """inlined: Sequentials within the block whose children are to be leaves, in place of themselves.

    A graph has one path through forward. Raises Refusal where another could be right the next time: one
    that depends on a tensor's values, on what is no plain attribute, on random numbers or on grad mode.
    """
    parameters = _required_parameters(block)
    sequences = {module for module in (block, *inlined) if is_sequence(module)}
    seen: Seen = {}
    reads: Reads = {}

    def run(inference: bool) -> Graph:
        observing, watching = observed(block, parameters, sequences, seen), watched(reads)
        with _for_inference(inference), observing, _no_random_numbers(), _NoTensors(), watching:
            return _BlockTracer(inlined).trace(block)

    try:
        graphs = [run(inference) for inference in (False, True)]
    except (Refusal, TraceError) as why:
        raise Refusal(str(why).strip().splitlines()[0]) from why
    except Exception as why:  # a forward may fail in any way on a symbol
        raise Refusal(f"{type(why).__name__}: {str(why).strip().splitlines()[:1]}") from why
    if str(graphs[0]) != str(graphs[1]):
        raise Refusal("forward depends on grad mode or autocast")
    used = {str(node.target) for node in graphs[0].nodes if node.op in ("call_module", "get_attr")}
    for name in used:
        if any(map(keyword.iskeyword, name.split("."))):
            raise Refusal(f"{name} is no name that torch.fx can write in Python")
    known = [
        children(path_of(name), module, inlined=True)
        for name, module in block.named_modules()
        if module in sequences
    ]
    guards = (*seen.values(), *known, *_shared(block, used), *reads.values())
    return Traced(graphs[0], parameters, guards)


def _required_parameters(block: nn.Module) -> tuple[str, ...]:
    """The required parameters of forward. The others keep their defaults: a call that passes more runs the
    original forward."""
    kinds = inspect.Parameter
    required = []
    for parameter in list(inspect.signature(original_class(type(block)).forward).parameters.values())[1:]:
        if parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD, kinds.KEYWORD_ONLY):
            raise Refusal(f"forward takes {parameter}, and not only named tensors")
        if parameter.default is kinds.empty:
            required.append(parameter.name)
    return tuple(required)


def _shared(block: nn.Module, used: set[str]) -> Iterator[Shared]:
    """Yields a guard for each module, parameter or buffer with several names that a graph uses."""
    names: defaultdict[object, list[str]] = defaultdict(list)
    for things in (block.named_modules, block.named_parameters, block.named_buffers):
        for name, thing in things(remove_duplicate=False):
            names[thing].append(name)
    for same in names.values():
        if len(same) > 1 and not used.isdisjoint(same):
            yield Shared(" or ".join(same), tuple(same))


class _BlockTracer(Tracer):
    proxy_buffer_attributes = True

    def __init__(self, inlined: set[nn.Module]) -> None:
        super().__init__()
        self.inlined = inlined
        self.around = _around()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined

    def proxy(self, node: Node) -> Proxy:
        return Symbol(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        raise Refusal("forward branches on a tensor, or on something of one")

    def iter(self, obj: Proxy) -> Iterator[Any]:
        raise Refusal("forward iterates over a tensor, or over something of one")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            return super().create_arg(a)
        if isinstance(a, Tensor) and a not in self.tensor_attrs:
            raise Refusal("forward makes a tensor of its own")
        kind = type(a)
        if kind is OrderedDict:  # torch.fx records every subclass of dict as a dict, and every list as a list
            return self.create_node("call_function", kind, (self.create_arg(list(a.items())),), {})
        if isinstance(a, (dict, list)) and kind not in (dict, list) and kind.__module__[:6] != "torch.":
            raise Refusal(f"forward makes a {kind.__name__}, which torch.fx does not")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _around() != self.around:
            raise Refusal("forward changes grad mode, autocast or how tensors are saved")
        return super().create_node(*args, **kwargs)


class _NoTensors(TorchDispatchMode):
    """Refuses operations on real tensors. While a forward runs with symbols, it has made or read them itself,
    and their values may differ the next time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Refusal("forward makes a tensor of its own")


def _around() -> tuple[object, ...]:
    """What forward may change for a part of itself, which no graph records."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES]
    saving = torch._C._autograd._top_saved_tensors_default_hooks(False)  # activation checkpointing's too
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), saving, *autocast


DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def _for_inference(on: bool) -> Iterator[None]:
    """Switches inference mode and autocast on or off together."""
    before = [torch.is_autocast_enabled(kind) for kind in DEVICES]
    try:
        with torch.inference_mode(on), torch.set_grad_enabled(not on):
            for kind in DEVICES:
                torch.set_autocast_enabled(kind, on)
            yield
    finally:
        for kind, enabled in zip(DEVICES, before, strict=True):
            torch.set_autocast_enabled(kind, enabled)


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Raises Refusal if Python's or numpy's generator was used: the graph would take the same branch for
    ever. (torch's random numbers are tensors, which are refused anyway.)"""
    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    arrays = numpy and numpy.get_state()
    try:
        yield
    finally:
        drawn = random.getstate() != python
        random.setstate(python)
        if numpy:
            drawn = drawn or repr(numpy.get_state()) != repr(arrays)
            numpy.set_state(arrays)
    if drawn:
        raise Refusal("forward draws random numbers")
