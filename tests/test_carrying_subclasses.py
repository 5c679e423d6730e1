"""Subclasses that are an ordinary tensor and what it carries: they run the kernels, and come back as what
torch.nn's layer makes of them. The stand-ins say of functions what MONAI's, torchvision's and torch's own
subclasses say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import bnfast


class Default(Tensor):
    """Whose say is torch.Tensor's: all that comes of it is one."""


class Meta(Tensor):
    """Results carry on its metadata, as MONAI's MetaTensor's do, and fastai's TensorBase's."""

    meta: dict[str, Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        given = (*args, *(kwargs or {}).values())
        first = next((a for a in given if isinstance(a, Meta) and hasattr(a, "meta")), None)
        if isinstance(result, Meta) and first is not None:
            result.meta = dict(first.meta)
        return result


class Unwrapped(Tensor):
    """Results are ordinary, as torchvision's tv_tensors' are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(cls, t) for t in types):
            return NotImplemented
        with DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        return result.as_subclass(Tensor) if isinstance(result, cls) else result


class Silent(Tensor):
    """Has no say."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def of(kind: type[Tensor], t: Tensor) -> Any:
    t = t.as_subclass(kind)
    if kind is Meta:
        t.meta = {"spacing": 2}
    return t


LAYERS: dict[str, Any] = {
    "batch": lambda library: library.BatchNorm2d(4),
    "batch, eval": lambda library: library.BatchNorm2d(4).eval(),
    "group": lambda library: library.GroupNorm(2, 4),
    "instance": lambda library: library.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layer": lambda library: library.LayerNorm(3),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
KINDS = (Default, Meta, Unwrapped, Silent)


def data(seed: int) -> Tensor:
    return torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


def step(layer: nn.Module, kinds: tuple[type[Tensor], type[Tensor] | None], ours: bool) -> dict[str, Any]:
    """kinds: of the input, and of the residual, if there is one."""
    x = of(kinds[0], data(0))
    x.requires_grad_()
    z = None if kinds[1] is None else of(kinds[1], data(1))
    y = layer(x, residual=z) if ours else layer(x) if z is None else layer(x) + z
    (y * data(2)).sum().backward()
    found = {"y": y.detach(), "dx": x.grad, **{f"d{k}": p.grad for k, p in layer.named_parameters()}}
    return found | dict(layer.named_buffers())


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, value in theirs.items():
        assert type(ours[name]) is type(value), name
        assert getattr(ours[name], "meta", None) == getattr(value, "meta", None), name
        assert_close(ours[name].as_subclass(Tensor), value.as_subclass(Tensor), rtol=1e-4, atol=1e-5)


@every_layer
@pytest.mark.parametrize("residual", ["no residual", "residual too", "residual alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind: type[Tensor], residual: str, name: str, launches: list[Any]) -> None:
    kinds = (Tensor if residual == "residual alone" else kind, None if residual == "no residual" else kind)
    found = step(LAYERS[name](bnfast), kinds, True)
    assert len(launches) >= 2
    same(found, step(LAYERS[name](nn), kinds, False))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_functions_and_parameters(kind: type[Tensor], launches: list[Any]) -> None:
    """nn.Parameter keeps the type of a subclass."""
    weight = nn.Parameter(of(kind, torch.rand(4)))
    for x in (data(0), of(kind, data(0))):
        launches.clear()
        for f, g in zip(functions(bnfast.functional, weight), functions(nn.functional, weight), strict=True):
            same({"y": f(x)}, {"y": g(x)})
        assert len(launches) >= 4


def functions(library: Any, w: Tensor) -> list[Any]:
    return [
        lambda x: library.batch_norm(x, None, None, w, None, True).detach(),
        lambda x: library.group_norm(x, 2, w).detach(),
        lambda x: library.instance_norm(x, weight=w).detach(),
        lambda x: library.layer_norm(x.transpose(1, 3), (4,), w).detach(),
    ]


def test_those_that_dispatch_run_plain_torch(launches: list[Any]) -> None:
    layer = bnfast.BatchNorm2d(4)
    y = layer(TwoTensor(data(0), data(1)))
    assert type(y) is TwoTensor
    assert not launches


@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_sees_torchs_function(kind: type[Tensor], plain_torch: None) -> None:
    """Where there are no kernels for the input, nothing is between the subclass and torch's function."""
    same(step(bnfast.BatchNorm2d(4), (kind, None), True), step(nn.BatchNorm2d(4), (kind, None), False))


@every_layer
@pytest.mark.parametrize("kind", [Default, Unwrapped])
def test_compiled(kind: type[Tensor], name: str) -> None:
    torch._dynamo.reset()
    found = []
    for library in (bnfast, nn):
        layer = LAYERS[name](library)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        found.append({"y": compiled(of(kind, data(0))).detach(), **dict(layer.named_buffers())})
    same(*found)


def test_monai(launches: list[Any]) -> None:
    monai = pytest.importorskip("monai.data")
    x = monai.MetaTensor(data(0), meta={"filename_or_obj": "scan.nii"})
    found = [LAYERS["instance"](library)(x) for library in (bnfast, nn)]
    assert launches
    assert type(found[0]) is monai.MetaTensor
    assert found[0].meta["filename_or_obj"] == "scan.nii"
    assert_close(found[0].as_tensor(), found[1].as_tensor(), rtol=1e-4, atol=1e-5)


def test_torchvision(launches: list[Any]) -> None:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    x = tv_tensors.Image(data(0))
    for context in ("TVTensor", "Tensor"):
        with tv_tensors.set_return_type(context):
            ours, theirs = (LAYERS["batch"](library)(x) for library in (bnfast, nn))
        assert type(ours) is type(theirs)
        assert_close(ours.as_subclass(Tensor), theirs.as_subclass(Tensor), rtol=1e-4, atol=1e-5)
    assert launches
