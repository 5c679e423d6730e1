"""The table of layers: how each is made, which layer it must equal, and what it takes. And the table of
functions, with and without what follows them.

Tests take their layers and functions from `every_layer`, `drop_ins`, `tracking` and `every_norm`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import bnfast
from bnfast import exact, functional
from bnfast.activation import Activation
from bnfast.checks import reference_layers
from bnfast.checks.cases import FORMATS
from tests.support.buffers import bit_identical
from tests.support.convertible import TorchvisionFrozen
from tests.support.versions import WITHOUT_BIAS

CLOSE = {"rtol": 1.3e-6, "atol": 1e-5}
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # of fp64
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Options = dict[str, Any]
Named = dict[str, Any]
Function = Callable[..., Tensor]

every_path = pytest.mark.parametrize("path", ["kernels", "torch"], indirect=True)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
both_layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    """Random numbers around 0.5. last: channels_last, where there is such a thing."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    x = x.to(dtype)
    return x.contiguous(memory_format=FORMATS[len(shape)]) if last and len(shape) in FORMATS else x


@dataclass(frozen=True)
class Layer:
    """name: in bnfast. arguments: the positional ones. shape: of an input. theirs: torch.nn's layer, or one
    that computes the same in plain torch. options: what else its constructor takes."""

    name: str
    arguments: tuple[Any, ...]
    shape: tuple[int, ...]
    theirs: Callable[..., nn.Module]
    options: tuple[Options, ...] = ()
    tracks: Options | None = None  # the options with which it has running statistics
    keeps_format: bool = False  # whether what is channels_last stays so
    aten: str = "_norm"  # part of the name of an operator that its form in plain torch has

    def __str__(self) -> str:
        return self.name

    @property
    def ours(self) -> Callable[..., nn.Module]:
        made: Callable[..., nn.Module] = getattr(bnfast, self.name)
        return made

    @property
    def drop_in(self) -> bool:
        return hasattr(nn, self.name)

    def make(self, **options: Any) -> Any:
        """Ours, with random parameters."""
        return self.pair(**options)[0]

    def pair(self, **options: Any) -> tuple[Any, Any]:
        """Ours and theirs, with the same random parameters."""
        pair = self.ours(*self.arguments, **options), self.theirs(*self.arguments, **options)
        if not self.drop_in:
            pair[1].load_state_dict(pair[0].state_dict())
        for module in pair:
            with torch.no_grad():
                for n, t in enumerate(module.parameters() if self.drop_in else module.state_dict().values()):
                    if t.is_floating_point():
                        t.copy_(data(*t.shape, seed=n + 7).abs() + 0.1)
        return pair

    def input(self, seed: int = 0, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
        return data(*self.shape, seed=seed, dtype=dtype, last=last)


_ALWAYS: tuple[Options, ...] = ({}, {"eps": 0.1}, {"dtype": torch.float64})
_BATCH = (
    *_ALWAYS, {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"affine": False},
    {"track_running_stats": False}, *WITHOUT_BIAS,
)  # fmt: skip
TRACKING: Options = {"track_running_stats": True, "affine": True}
_INSTANCE = (
    *_ALWAYS, {"affine": True}, {"track_running_stats": True, "momentum": 0.3},
    {**TRACKING, "momentum": None}, *({"affine": True, **without} for without in WITHOUT_BIAS),
)  # fmt: skip
_GROUP = (*_ALWAYS, {"affine": False}, *WITHOUT_BIAS)


def _frozen(channels: int, eps: float = 1e-5, dtype: torch.dtype | None = None) -> nn.Module:
    return TorchvisionFrozen(channels, eps).to(dtype)


LAYERS = [
    Layer("BatchNorm2d", (4,), (3, 4, 5, 6), nn.BatchNorm2d, _BATCH, {}, True),
    Layer("BatchNorm1d", (4,), (3, 4, 9), nn.BatchNorm1d, ({},), {}, True),
    Layer("BatchNorm3d", (4,), (2, 4, 3, 4, 3), nn.BatchNorm3d, ({},), {}, True),
    Layer("InstanceNorm2d", (4,), (3, 4, 5, 6), nn.InstanceNorm2d, _INSTANCE, TRACKING, True),
    Layer("InstanceNorm1d", (4,), (3, 4, 9), nn.InstanceNorm1d, ({}, TRACKING), TRACKING, True),
    Layer("InstanceNorm3d", (4,), (2, 4, 3, 4, 3), nn.InstanceNorm3d, ({}, TRACKING), TRACKING, True),
    Layer("GroupNorm", (3, 6), (3, 6, 4, 5), nn.GroupNorm, _GROUP, None, True),
    Layer(
        "LayerNorm", ((2, 6),), (4, 3, 2, 6), nn.LayerNorm,
        (*_ALWAYS, {"elementwise_affine": False}, *WITHOUT_BIAS),
    ),
    Layer(
        "BatchRenorm2d", (4,), (3, 4, 5, 6), reference_layers.BatchRenorm2d,
        (*_ALWAYS, {"affine": False}, {"warmup_steps": 0, "r_max_steps": 1, "d_max_steps": 1}), {}, True,
    ),
    Layer("FrozenBatchNorm2d", (4,), (3, 4, 5, 6), _frozen, _ALWAYS, {}, True),
]  # fmt: skip
BY_NAME = {layer.name: layer for layer in LAYERS}
KINDS = [layer for layer in LAYERS if not layer.name.endswith(("1d", "3d"))]  # one of each
every_layer = pytest.mark.parametrize("layer", KINDS, ids=str)
drop_ins = pytest.mark.parametrize("layer", [layer for layer in KINDS if layer.drop_in], ids=str)
tracking = pytest.mark.parametrize("layer", [layer for layer in KINDS if layer.tracks is not None], ids=str)


def step(module: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Named:
    """A forward and a backward, by way of `run` if given: all that they return, and the state they leave."""
    given, x = x, x.detach().clone().requires_grad_()
    module.zero_grad()
    y = (module if run is None else run)(x)
    y.backward(data(*y.shape, seed=9, dtype=y.dtype))
    assert bit_identical(x, given), "the input was written to"
    gradients = {f"d{name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **copy.deepcopy(module.state_dict())}


def attempt(call: Callable[[], Any]) -> Any:
    """What it returns, or the type of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(ours: Named, theirs: Named, **options: Any) -> None:
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        close = EXACT if expected is not None and expected.dtype == torch.float64 else CLOSE
        assert_close(ours[key], expected, msg=lambda m, key=key: f"{key}: {m}", **{**close, **options})


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """A running mean and a running variance, new each time."""
    kind: Any = {"dtype": exact.accumulator(x.dtype), "device": x.device}
    return torch.linspace(-1, 1, x.shape[1], **kind), torch.linspace(0.5, 2, x.shape[1], **kind)


def groups(x: Tensor) -> int:
    return max(1 if x.shape[1] % 2 else 2, x.shape[1] // 8)


def call_of(name: str, second: Callable[[Tensor], tuple[Any, ...]], *last: Any) -> Function:
    """Calls the function of this name of bnfast.functional or torch.nn.functional. second: what comes between
    x and weight. last: what comes after bias."""
    return lambda f, x, w=None, b=None, **after: getattr(f, name)(x, *second(x), w, b, *last, **after)


NORMS: dict[str, Function] = {
    "batch": call_of("batch_norm", lambda x: (None, None), True),
    "batch, tracking": call_of("batch_norm", statistics, True),
    "batch, eval": call_of("batch_norm", statistics),
    "group": call_of("group_norm", lambda x: (groups(x),)),
    "instance": call_of("instance_norm", lambda x: (None, None)),
    "instance, eval": call_of("instance_norm", statistics, False),
    "layer": call_of("layer_norm", lambda x: (x.shape[-1:],)),
}
every_norm = pytest.mark.parametrize("norm", NORMS)


def followed(y: Tensor, residual: Tensor | None, activation: Any) -> Tensor:
    """act(y + residual), by torch."""
    y, act = y if residual is None else y + residual, Activation.of(activation)
    return y if act is None else act.apply(y)


def norms(norm: str | Function) -> tuple[Function, Function]:
    """Ours and torch's, of a name or a call as in NORMS: functions of x, weight, bias and residual, and of an
    activation."""
    call = NORMS[norm] if isinstance(norm, str) else norm

    def ours(
        x: Tensor, w: Tensor | None = None, b: Tensor | None = None, z: Any = None, **options: Any
    ) -> Any:
        return call(functional, x, w, b, residual=z, **options)

    def theirs(
        x: Tensor, w: Tensor | None = None, b: Tensor | None = None, z: Any = None, activation: Any = None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        return followed(call(F, x, w, b, **options), z, activation)

    return ours, theirs


def parameters(name: str, x: Tensor, activation: Any = None) -> list[Tensor]:
    """A weight, a bias and, where an activation follows, a residual, all of which want gradients."""
    count = x.shape[-1] if name == "layer" else x.shape[1]
    sizes = [(count,), (count,), *([x.shape] if activation else [])]
    return [data(*size, seed=n, dtype=x.dtype).requires_grad_() for n, size in enumerate(sizes, 1)]


def derivatives(
    function: Function, x: Tensor, given: list[Tensor], dy: Tensor | None = None, **options: Any
) -> Named:
    """The output, and the gradients of x and of what is given, which are not copied."""
    leaves = [t.detach().requires_grad_() for t in (x, *given)]
    y = function(*leaves, **options)
    gradients = torch.autograd.grad(y, leaves, data(*y.shape, seed=9, dtype=y.dtype) if dy is None else dy)
    return {"y": y.detach(), **dict(zip(("dx", "dweight", "dbias", "dz"), gradients, strict=False))}
