"""The epilogue act(normalized + residual), which runs in the kernels that normalize.

One table describes the activations; activations.py has their device functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import dense_like, is_channels_last
from .views import packs

PIECEWISE, SMOOTH = 1, 2  # the cost of an activation in registers: see plan.py


class Row(NamedTuple):
    """An activation of the table. slope: its derivative in plain torch, differentiable, with torch's choice
    at corners. parameter: its default; None: it has no parameter."""

    torch: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    cost: int = SMOOTH
    parameter: float | None = None


def _gelu_tanh_slope(v: Tensor) -> Tensor:
    t = torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v * v * v))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v * v)
    return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * inner


def _mish_slope(v: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(v))
    return t + v * torch.sigmoid(v) * (1 - t * t)


def _gelu_slope(v: Tensor) -> Tensor:
    density = torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(v * math.sqrt(0.5))) + v * density


def _ones_where(condition: Tensor, v: Tensor, otherwise: float = 0.0) -> Tensor:
    return torch.where(condition, torch.ones_like(v), otherwise)


ACTIVATIONS = {
    "relu": Row(F.relu, lambda v: torch.where(v <= 0, 0.0, torch.ones_like(v)), PIECEWISE),
    "relu6": Row(F.relu6, lambda v: torch.where((v <= 0) | (v >= 6), 0.0, torch.ones_like(v)), PIECEWISE),
    "leaky_relu": Row(F.leaky_relu, lambda v, slope: _ones_where(v > 0, v, slope), PIECEWISE, 0.01),
    "elu": Row(F.elu, lambda v, a: torch.where(v <= 0, a * torch.exp(v.clamp(max=0)), 1.0), parameter=1.0),
    "silu": Row(F.silu, lambda v: torch.sigmoid(v) * (1 + v * (1 - torch.sigmoid(v)))),
    "gelu": Row(F.gelu, _gelu_slope),
    "gelu_tanh": Row(partial(F.gelu, approximate="tanh"), _gelu_tanh_slope),
    "hardswish": Row(
        F.hardswish,
        lambda v: torch.where(v <= -3, 0.0, torch.where(v < 3, v / 3 + 0.5, 1.0)),
    ),
    "hardsigmoid": Row(F.hardsigmoid, lambda v: _ones_where((v > -3) & (v < 3), v) / 6, PIECEWISE),
    "mish": Row(F.mish, _mish_slope),
    "sigmoid": Row(F.sigmoid, lambda v: torch.sigmoid(v) * (1 - torch.sigmoid(v))),
    "tanh": Row(F.tanh, lambda v: 1 - torch.tanh(v) ** 2),
}
NAMES = tuple(ACTIVATIONS)
PARAMETERS = {name: row.parameter for name, row in ACTIVATIONS.items() if row.parameter is not None}
_SPELLINGS = {name.replace("_", ""): name for name in NAMES} | {"swish": "silu"}
# Kernels compute in fp32, where a parameter must be finite too. Any sign is allowed: forward and backward
# decide from x, not from the output, on which side of 0 an element is.
_LARGEST = torch.finfo(torch.float32).max
_RANGE = "between -3.4e38 and 3.4e38"


class Activation(NamedTuple):
    """An activation that the kernels apply; the type of a layer's attribute `activation`.

    The names are relu, relu6, leaky_relu, elu, silu, gelu, gelu_tanh, hardswish, hardsigmoid, mish, sigmoid
    and tanh. `Activation.of(value)` makes one of anything that an `activation=` argument accepts, and raises
    ValueError for other values.

    Args:
        name (str): One of bnfast.activation.NAMES.
        parameter (float): The slope of leaky_relu below 0, or the alpha of elu; 0 for all others.

    Example:
        >>> bnfast.Activation.of("LeakyReLU")
        Activation(name='leaky_relu', parameter=0.01)
        >>> bnfast.Activation.of(("elu", 0.5))
        Activation(name='elu', parameter=0.5)
        >>> bnfast.Activation.of(nn.SiLU()) == bnfast.Activation.of(F.silu) == bnfast.Activation("silu")
        True
        >>> bnfast.GroupNorm(4, 16, activation=nn.GELU).activation
        Activation(name='gelu', parameter=0.0)
    """

    name: str
    parameter: float = 0.0

    @classmethod
    def of(cls, value: Any) -> Activation | None:
        """The activation that an `activation=` argument means: None; a name, in torch.nn's spelling too; a
        name with a number, such as ("leaky_relu", 0.2); torch's module, class or function. Raises
        ValueError for anything else."""
        if value is None:
            return None
        name, *rest = value if isinstance(value, tuple) and value else (value,)
        if isinstance(name, str):
            plain = name.lower().replace("_", "").replace("-", "")
            name = name if name in ACTIVATIONS else _SPELLINGS.get(plain)
        elif not rest:
            found = _of_torch(value)
            if found is not None:
                return found
        if not isinstance(name, str):
            raise ValueError(
                f"activation must be None, one of {', '.join(NAMES)}, torch's module, class or function of "
                f"one of these, or ({' or '.join(map(repr, PARAMETERS))}, number {_RANGE}), but got {value!r}"
            )
        if not rest or name not in PARAMETERS:
            if rest and rest != [0.0]:
                raise ValueError(f"activation {name!r} takes no parameter, but got {value!r}")
            return cls(name, PARAMETERS.get(name, 0.0))
        found = _with_parameter(name, rest[0]) if len(rest) == 1 else None
        if found is None:
            raise ValueError(
                f"activation {name!r} takes as its parameter one number {_RANGE}, but got {value!r}"
            )
        return found

    def apply(self, x: Tensor) -> Tensor:
        """The activation of x, element by element, in plain torch."""
        rest = (self.parameter,) if self.name in PARAMETERS else ()
        return ACTIVATIONS[self.name].torch(x, *rest)

    def slope(self, v: Tensor) -> Tensor:
        """The derivative at v, in plain torch."""
        rest = (self.parameter,) if self.name in PARAMETERS else ()
        return ACTIVATIONS[self.name].slope(v, *rest)


IDENTITY = Activation("none")  # only kernels and plans see it


class Epilogue(NamedTuple):
    """The epilogue of a call. mask: whether relu's backward may use a mask, 1 where relu lets an element
    through, in place of the residual. In a backward, residual is what the forward has kept: the residual or
    this mask."""

    activation: Activation = IDENTITY
    residual: Tensor | None = None
    mask: bool = False

    def in_forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(the residual in x's memory order, an empty tensor for the mask if there will be one)."""
        if self.residual is None:
            return None, None
        return dense_like(self.residual, x), empty_mask(x) if self.mask else None

    def in_backward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(the residual in x's memory order, None) or (None, the mask)."""
        kept = self.residual
        if kept is None:
            return None, None
        return (None, kept.contiguous()) if kept.dtype in MASKS else (dense_like(kept, x), None)


NO_EPILOGUE = Epilogue()
MASKS = {torch.uint8: "bits", torch.bool: "bytes"}  # relu's mask, by its dtype


def empty_mask(x: Tensor) -> Tensor:
    """For relu's mask of x, in x's memory order: a bit for each element, or a byte."""
    s = x.numel() // max(1, x.shape[0] * x.shape[1])
    if packs(x.shape[1], s, is_channels_last(x)):
        return x.new_empty(x.numel() // 8, dtype=torch.uint8)
    return x.new_empty(x.numel(), dtype=torch.bool)


def kind_of(mask: Tensor | None) -> str:
    """EpiloguePlan.mask."""
    return "" if mask is None else MASKS[mask.dtype]


class EpiloguePlan(NamedTuple):
    """The epilogue as the plan of a training step sees it. mask: "bits" or "bytes" of relu's mask, which the
    backward uses in place of the residual, or ""."""

    activation: str = "none"
    residual: bool = False
    mask: str = ""

    @classmethod
    def of(cls, activation: str, residual: bool, c: int, s: int, channels_last: bool) -> EpiloguePlan:
        """With a mask if relu's backward uses one. activation: its name, or "none"."""
        mask = (
            ("bits" if packs(c, s, channels_last) else "bytes") if residual and activation == "relu" else ""
        )
        return cls(activation, residual, mask)

    @property
    def kept(self) -> str:
        """What the backward reads for the residual: "residual", a mask or, without an activation, "", since
        the residual's gradient is dy."""
        if not self.residual or self.activation == "none":
            return ""
        return self.mask or "residual"

    @property
    def activation_of_dx(self) -> str:
        """The activation whose slope the last pass of a backward computes. With a residual it reads
        dresidual, which contains the slope."""
        return "none" if self.kept else self.activation

    def forward_bytes(self, elements: int, itemsize: int) -> int:
        """The residual is read and the mask written."""
        return self.residual * elements * itemsize + self._mask_bytes(elements)

    def backward_bytes(self, elements: int, itemsize: int) -> int:
        """The residual or the mask is read and dresidual written, which is then read in place of dy."""
        each = elements * itemsize
        return {"": 0, "residual": 2 * each}.get(self.kept, each) + self._mask_bytes(elements)

    def _mask_bytes(self, elements: int) -> int:
        return {"bits": elements // 8, "bytes": elements}.get(self.kept, 0)


NO_EPILOGUE_PLAN = EpiloguePlan()

# the type of an argument `activation=`
ActivationLike = (
    str | tuple[str, float] | nn.Module | type[nn.Module] | Callable[..., Tensor] | Activation | None
)


def _with_parameter(name: str, value: Any) -> Activation | None:
    number = type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
    return Activation(name, float(value)) if number and abs(value) <= _LARGEST else None


class Form:
    """A kind of activation in torch. parameters: a module's attributes, and a function's arguments after its
    input, with their defaults. make: the Activation that these mean, or None."""

    def __init__(self, make: Callable[..., Activation | None], **parameters: Any) -> None:
        self.make, self.parameters = make, parameters
        self.fixed = None if parameters else make()


def _fixed(name: str) -> Form:
    return Form(lambda: Activation(name))


_RELU, _SIGMOID, _TANH = _fixed("relu"), _fixed("sigmoid"), _fixed("tanh")
_HARDTANH = Form(
    lambda min_val, max_val: Activation("relu6") if (min_val, max_val) == (0, 6) else None,
    min_val=-1.0,
    max_val=1.0,
)
_LEAKY = Form(lambda negative_slope: _with_parameter("leaky_relu", negative_slope), negative_slope=0.01)
_ELU = Form(lambda alpha: _with_parameter("elu", alpha), alpha=1.0)
_GELU = Form(
    lambda approximate: Activation("gelu_tanh" if approximate == "tanh" else "gelu"), approximate="none"
)
MODULES: dict[type, Form] = {
    nn.ReLU: _RELU,
    nn.ReLU6: _HARDTANH,
    nn.Hardtanh: _HARDTANH,
    nn.LeakyReLU: _LEAKY,
    nn.ELU: _ELU,
    nn.GELU: _GELU,
    nn.SiLU: _fixed("silu"),
    nn.Hardswish: _fixed("hardswish"),
    nn.Hardsigmoid: _fixed("hardsigmoid"),
    nn.Mish: _fixed("mish"),
    nn.Sigmoid: _SIGMOID,
    nn.Tanh: _TANH,
}
# strings are names of Tensor's methods
FUNCTIONS: dict[Any, Form] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _RELU),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), _SIGMOID),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), _TANH),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _HARDTANH),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _LEAKY),
    **dict.fromkeys((F.elu, F.elu_), _ELU),
    F.gelu: _GELU,
    F.relu6: _fixed("relu6"),
    F.silu: _fixed("silu"),
    F.hardswish: _fixed("hardswish"),
    F.hardsigmoid: _fixed("hardsigmoid"),
    F.mish: _fixed("mish"),
}


def of_module(module: object) -> Activation | None:
    """The activation that a module computes with its present attributes; None for other modules, among them
    subclasses of torch.nn's."""
    form = MODULES.get(type(module))
    if form is None:
        return None
    if form.fixed is not None:  # every call of a fused block asks
        return form.fixed
    return form.make(*[getattr(module, name) for name in form.parameters])


def _of_torch(value: Any) -> Activation | None:
    """The activation of torch's module, class or function; None if it is, or does, anything else."""
    if isinstance(value, nn.Module):
        held = value.__dict__
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return None if "forward" in held or any(held[kind] for kind in hooks) else of_module(value)
    if isinstance(value, type):
        return of_module(value()) if value in MODULES else None
    form = FUNCTIONS.get(value) if callable(value) and isinstance(value, Hashable) else None
    return form.make(**form.parameters) if form else None
