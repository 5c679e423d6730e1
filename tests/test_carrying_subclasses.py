"""Subclasses of Tensor. Those that are an ordinary tensor and what it carries run the kernels, and come back
as what torch.nn's layer makes of them; the stand-ins treat functions as MONAI's, torchvision's and torch's
own subclasses do. Those that dispatch run plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.testing import assert_close
from torch.testing._internal.logging_tensor import LoggingTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from bnfast import functional
from tests.support.layers import BY_NAME, Layer, both_modes, data, drop_ins, every_norm, every_path, norms

pytestmark = pytest.mark.compiled

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Default(Tensor):
    """It keeps torch.Tensor's __torch_function__: all results are of this class."""


class Meta(Tensor):
    """Results carry on its metadata, as those of MONAI's MetaTensor and fastai's TensorBase do."""

    meta: dict[str, Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        carried = [a.meta for a in (*args, *(kwargs or {}).values()) if hasattr(a, "meta")]
        if isinstance(result, Meta) and carried:
            result.meta = carried[0]
        return result


class Unwrapped(Tensor):
    """Results are ordinary, as those of torchvision's tv_tensors are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(cls, t) for t in types):
            return NotImplemented
        with DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        return result.as_subclass(Tensor) if isinstance(result, cls) else result


class Silent(Tensor):
    """It overrides no function."""

    __torch_function__ = torch._C._disabled_torch_function_impl


KINDS = (Default, Meta, Unwrapped, Silent)


def of(kind: type[Tensor], t: Tensor) -> Any:
    t = t.as_subclass(kind)
    if kind is Meta:
        t.meta = {"spacing": 2}
    return t


def doubled(t: Tensor) -> Tensor:
    return TwoTensor(t, t.clone())


def plain(t: Any) -> Tensor:
    return t.a if isinstance(t, TwoTensor) else Tensor.as_subclass(t, Tensor)


def step(layer: nn.Module, x: Tensor, z: Tensor | None = None) -> dict[str, Any]:
    """A forward, with a residual if there is one, and a backward."""
    x.requires_grad_()
    ours = type(layer).__module__.startswith("bnfast")
    y = layer(x, residual=z) if ours else layer(x) if z is None else layer(x) + z
    (y * data(*x.shape, seed=2)).sum().backward()
    found = {"y": y.detach(), "dx": x.grad, **{f"d{k}": p.grad for k, p in layer.named_parameters()}}
    return found | dict(layer.named_buffers())


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, value in theirs.items():
        assert type(ours[name]) is type(value), name
        assert getattr(ours[name], "meta", None) == getattr(value, "meta", None), name
        assert_close(plain(ours[name].detach()), plain(value.detach()), **CLOSE)


@every_path
@both_modes
@drop_ins
@pytest.mark.parametrize("residual", ["no residual", "residual too", "residual alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers(
    kind: type[Tensor], residual: str, layer: Layer, training: bool, path: str, launches: list[Any]
) -> None:
    """In plain torch, nothing is between the subclass and torch's function."""
    found = []
    for module in layer.pair(**(layer.tracks or {})):
        x = layer.input() if residual == "residual alone" else of(kind, layer.input())
        z = None if residual == "no residual" else of(kind, layer.input(1))
        found.append(step(module.train(training), x, z))
    assert_same(*found)
    if training or not layer.name.startswith("Instance"):  # which does not unwrap subclasses in eval
        assert bool(launches) == (path == "kernels")


@every_norm
@pytest.mark.parametrize("kind", KINDS[:2])
def test_functions_and_parameters(kind: type[Tensor], norm: str, launches: list[Any]) -> None:
    """nn.Parameter keeps the type of a subclass."""
    weight = nn.Parameter(of(kind, data(4, seed=1)))
    for x in (data(2, 4, 3, 4), of(kind, data(2, 4, 3, 4))):
        launches.clear()
        assert_same(*({"y": function(x, weight)} for function in norms(norm)))
        assert launches or norm == "instance, eval"


@both_modes
@drop_ins
@pytest.mark.parametrize("kind", [Default, Unwrapped])
def test_compiled(kind: type[Tensor], layer: Layer, training: bool) -> None:
    torch._dynamo.reset()
    found = []
    for module in layer.pair(**(layer.tracks or {})):
        compiled = torch.compile(module.train(training), backend="eager", fullgraph=True)
        found.append({"y": compiled(of(kind, layer.input())).detach(), **dict(module.named_buffers())})
    assert_same(*found)


@every_path
@both_modes
@pytest.mark.parametrize("watched", [False, True], ids=["", "under a mode"])
@pytest.mark.parametrize("held", ["input", "weight", "running", "weight bias running"])
@pytest.mark.parametrize("wrap", [lambda t: of(Default, t), doubled], ids=["default", "doubled"])
def test_some_tensors_are_subclasses(
    wrap: Callable[[Tensor], Tensor], held: str, watched: bool, training: bool, path: str, launches: list[Any]
) -> None:
    """Quantized and sharded parameters are, beside an ordinary input. An input that dispatches runs plain
    torch."""
    found = []
    for module in BY_NAME["BatchNorm2d"].pair():
        for members in (module._parameters, module._buffers):
            for name, value in members.items():
                if name.partition("_")[0] in held.split():
                    members[name] = wrap(value.detach()).requires_grad_(value.requires_grad)
        x = data(3, 4, 5, 6)
        with LoggingTensorMode() if watched else contextlib.nullcontext():
            found.append(step(module.train(training), wrap(x) if held == "input" else x))
    assert_same(*found)
    assert not (launches and wrap is doubled and held == "input")


@every_norm
def test_functions_overridden_by_a_parameter(norm: str) -> None:
    """__torch_function__ of any argument sees the call of our function, as it would see that of torch's: with
    as many arguments by position."""

    class Listening(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func, args

    x, weight = data(2, 4, 3, 4), data(4, seed=1).as_subclass(Listening)
    (found, args), (_, expected) = (function(x, weight) for function in norms(norm))
    assert found is getattr(functional, f"{norm.partition(',')[0]}_norm")
    assert args[0] is x
    assert [type(a) for a in args] == [type(a) for a in expected]


MAKERS: list[tuple[str, Callable[..., Any]]] = [
    ("monai.data", lambda m, t: (m.MetaTensor(t, meta={"spacing": 2}), contextlib.nullcontext())),
    ("torchvision.tv_tensors", lambda m, t: (m.Image(t), m.set_return_type("Tensor"))),
    ("torchvision.tv_tensors", lambda m, t: (m.Image(t), m.set_return_type("TVTensor"))),
]


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
@pytest.mark.parametrize(("library", "make"), MAKERS)
def test_of_libraries(library: str, make: Callable[..., Any], name: str, launches: list[Any]) -> None:
    x, context = make(pytest.importorskip(library), data(3, 4, 5, 6))
    layer = BY_NAME[name]
    with context:
        assert_same(*({"y": module(x)} for module in layer.pair(**(layer.tracks or {}))))
    assert launches
