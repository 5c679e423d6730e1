"""One block's forward as a torch.fx graph whose leaves are the modules in it, with what it depended on."""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import TraceError

from .guards import Guard, Inlined, Unguardable, guard, original_class


class Untraceable(Exception):
    """Why a block's forward cannot be replaced by a graph of it."""


class Traced(NamedTuple):
    graph: Graph
    parameters: tuple[str, ...]  # the tensors that forward takes
    guards: tuple[Guard | Inlined, ...]


def is_sequence(module: nn.Module) -> bool:
    """Whether it calls its children one after another, and nothing else."""
    return isinstance(module, nn.Sequential) and original_class(type(module)).forward is nn.Sequential.forward


def trace(block: nn.Module, inlined: set[nn.Module]) -> Traced:
    """inlined: Sequentials within the block whose children are to be leaves, in place of themselves.

    A graph has one path through forward. Raises Untraceable where another could be right the next time: one
    that depends on a tensor's values, on what is no plain attribute, on random numbers or on grad mode.
    """
    parameters = _required_parameters(block)
    graphs: list[Graph] = []
    seen: dict[tuple[object, ...], Guard] = {}
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            tracer = _BlockTracer(inlined)
            with _observed(block, parameters, seen), _no_random_numbers():
                graphs.append(_run(tracer, block))
    if str(graphs[0]) != str(graphs[1]):
        raise Untraceable("forward depends on grad mode")
    sequences = [
        Inlined(tuple(name.split(".")) if name else (), tuple(module._modules))
        for name, module in block.named_modules()
        if module in inlined or (module is block and is_sequence(block))
    ]
    return Traced(graphs[0], parameters, (*seen.values(), *sequences))


def _required_parameters(block: nn.Module) -> tuple[str, ...]:
    """What forward must be given. Defaults stay defaults: a call that gives more takes the original path."""
    kinds = inspect.Parameter
    required = []
    for parameter in list(inspect.signature(original_class(type(block)).forward).parameters.values())[1:]:
        if parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD, kinds.KEYWORD_ONLY):
            raise Untraceable(f"forward takes {parameter}, and not only named tensors")
        if parameter.default is kinds.empty:
            required.append(parameter.name)
    return tuple(required)


def _run(tracer: _BlockTracer, block: nn.Module) -> Graph:
    try:
        return tracer.trace(block)
    except (Unguardable, TraceError) as why:
        raise Untraceable(str(why).strip().splitlines()[0]) from why
    except Exception as why:  # a forward may fail in any way on what is no tensor
        raise Untraceable(f"{type(why).__name__}: {str(why).strip().splitlines()[:1]}") from why


class _Tensor(Proxy):
    """Tells apart who asks whether it is a tensor: torch may, but a forward would get the wrong answer."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            raise TraceError("forward asks for the type of its input")
        return _Tensor


def _in_place(name: str) -> Callable[..., Any]:
    """torch.fx takes `a += b` for `a = a + b`, which is another thing where a has a second name."""
    function = getattr(operator, name)

    def write(left: Any, right: Any) -> Any:
        return function(left, right)

    def record(self: _Tensor, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", write, (self, other), {})

    setattr(_Tensor, f"__{name}__", record)
    return write


add_in_place = _in_place("iadd")
for _name in (
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
):
    _in_place(_name)


class _BlockTracer(Tracer):
    proxy_buffer_attributes = True

    def __init__(self, inlined: set[nn.Module]) -> None:
        super().__init__()
        self.inlined = inlined
        self.around = _around()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined

    def proxy(self, node: Node) -> Proxy:
        return _Tensor(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is not _Tensor and isinstance(a, Tensor) and a not in self.tensor_attrs:
            raise TraceError("forward makes a tensor of its own")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _around() != self.around:
            raise TraceError("forward changes grad mode, autocast or how tensors are saved")
        return super().create_node(*args, **kwargs)


def _around() -> tuple[object, ...]:
    """What forward may change for a part of itself, which no graph records."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    saving = torch._C._autograd._top_saved_tensors_default_hooks(False)  # activation checkpointing's too
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), saving, *autocast


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """A branch taken by chance would be taken for ever."""
    ours, torchs = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        # as lists: the model may be one of fake tensors, whose mode takes no others
        drawn = random.getstate() != ours or torch.get_rng_state().tolist() != torchs.tolist()
        random.setstate(ours)
        torch.set_rng_state(torchs)
    if drawn:
        raise Untraceable("forward draws random numbers")


_EMPTY = torch.empty(0)  # in place of what is a parameter or a buffer
_OWN = set(vars(nn.Module())) - {"training"}  # torch.nn.Module's own, read with every call


@contextlib.contextmanager
def _observed(
    block: nn.Module, parameters: tuple[str, ...], seen: dict[tuple[object, ...], Guard]
) -> Iterator[None]:
    """While it lasts, what is read on the block and on the modules in it is noted in `seen`, and the block's
    forward takes its required parameters only."""
    classes: list[tuple[nn.Module, type]] = []
    try:
        for name, module in block.named_modules():
            cls = type(module)
            members = _spy(cls, tuple(name.split(".")) if name else (), seen)
            members["_bnfast_original"] = original_class(cls)  # for guards, which note the classes of modules
            if module is block:
                members["forward"] = _forward_of(original_class(cls), parameters)
            try:
                module.__class__ = type(cls.__name__, (cls,), members)
            except TypeError as why:
                raise Untraceable(f"{cls.__name__} ({name or 'itself'}) cannot be observed: {why}") from why
            classes.append((module, cls))
        yield
    finally:
        for module, cls in classes:
            object.__setattr__(module, "__class__", cls)
        written = [guard.name for guard in seen.values() if guard.put_back(block)]
    if written:
        raise Untraceable(f"forward writes to {written[0]}")


def _forward_of(cls: Any, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """torch.fx asks the code of a forward for its parameters."""
    names = ", ".join(("self", *parameters))
    forward: Callable[..., Any] = eval(f"lambda {names}: forward({names})", {"forward": cls.forward})
    return forward


def _spy(cls: Any, path: tuple[str, ...], seen: dict[tuple[object, ...], Guard]) -> dict[str, Any]:
    """Members of a subclass that notes what is read on its one instance, and lets nothing be set."""

    def note(module: nn.Module, name: str, value: Any) -> Any:
        method = type(value) is MethodType and value.__self__ in (module, type(module))
        if name not in _OWN and not name.startswith("__") and not method and (path, name) not in seen:
            seen[path, name] = guard(path, name, _EMPTY if type(value) is _Tensor else value)
        return value

    def __getattribute__(self: Any, name: str) -> Any:
        return note(self, name, cls.__getattribute__(self, name))

    def __getattr__(self: Any, name: str) -> Any:
        return note(self, name, cls.__getattr__(self, name))

    def __setattr__(self: Any, name: str, value: Any) -> None:
        raise TraceError(f"forward sets {name}")

    return {f.__name__: f for f in (__getattribute__, __getattr__, __setattr__)}
