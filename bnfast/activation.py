"""The activations that layers apply to what they normalize, and what they are in torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PLAIN: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
}
NAMES = tuple(_PLAIN)
PARAMETERS = {"leaky_relu": 0.01, "elu": 1.0}  # torch.nn's defaults
_SPELLINGS = {name.replace("_", ""): name for name in NAMES} | {"swish": "silu"}
# Kernels compute in fp32, so there it must be a number too. Either sign is right: forward and backward find
# from x, not from the output, which side of 0 an element is on.
_LARGEST = torch.finfo(torch.float32).max
_RANGE = "between -3.4e38 and 3.4e38"


class Activation(NamedTuple):
    """One of NAMES, with its parameter: leaky_relu's slope below 0, elu's alpha, 0 for all others."""

    name: str
    parameter: float = 0.0

    @classmethod
    def of(cls, value: Any) -> Activation | None:
        """What an `activation=` argument means: None; a name, in torch.nn's spelling too; a name with a
        number, as in ("leaky_relu", 0.2); torch's module, class or function of the activation. Raises
        ValueError for anything else."""
        if value is None:
            return None
        name, *rest = value if isinstance(value, tuple) and value else (value,)
        if isinstance(name, str):
            name = name if name in _PLAIN else _SPELLINGS.get(name.lower().replace("_", "").replace("-", ""))
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
        return _PLAIN[self.name](x, *rest)


# what `activation=` takes
ActivationLike = (
    str | tuple[str, float] | nn.Module | type[nn.Module] | Callable[..., Tensor] | Activation | None
)


def _with_parameter(name: str, value: Any) -> Activation | None:
    number = type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
    return Activation(name, float(value)) if number and abs(value) <= _LARGEST else None


class Form:
    """What an activation of torch's is set by, a module's attributes and a function's arguments after its
    input, with their defaults; and what that makes, None being none of NAMES."""

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
# and methods of Tensor, by name
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
    """The activation that calling a module is, as its attributes stand now; None for all other modules,
    subclasses of torch.nn's included."""
    form = MODULES.get(type(module))
    if form is None:
        return None
    if form.fixed is not None:  # with every call of a fused block
        return form.fixed
    return form.make(*[getattr(module, name) for name in form.parameters])


def _of_torch(value: Any) -> Activation | None:
    """What a module, class or function of torch is; None where it is, or does, anything else."""
    if isinstance(value, nn.Module):
        held = value.__dict__
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return None if "forward" in held or any(held[kind] for kind in hooks) else of_module(value)
    if isinstance(value, type):
        return of_module(value()) if value in MODULES else None
    form = FUNCTIONS.get(value) if callable(value) and isinstance(value, Hashable) else None
    return form.make(**form.parameters) if form else None
