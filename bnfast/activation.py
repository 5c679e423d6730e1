"""The activations that layers apply to what they normalize."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

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


class Activation(NamedTuple):
    """One of NAMES, with its parameter: leaky_relu's slope below 0, elu's alpha, 0 for all others."""

    name: str
    parameter: float = 0.0

    @classmethod
    def of(cls, value: Any) -> Activation | None:
        """What an `activation=` argument means: None, a name, or a name with a number, as in
        ("leaky_relu", 0.2). Raises ValueError for anything else."""
        if value is None:
            return None
        name, *rest = value if isinstance(value, tuple) and value else (value,)
        if not isinstance(name, str) or name not in _PLAIN:
            raise ValueError(
                f"activation must be None, one of {', '.join(NAMES)}, or (name, parameter), but got {value!r}"
            )
        if not rest or name not in PARAMETERS:
            if rest and rest != [0.0]:
                raise ValueError(f"activation {name!r} takes no parameter, but got {value!r}")
            return cls(name, PARAMETERS.get(name, 0.0))
        if len(rest) > 1 or isinstance(rest[0], bool) or not isinstance(rest[0], Real):
            raise ValueError(f"activation {name!r} takes one number as its parameter, but got {value!r}")
        return cls(name, float(rest[0]))

    def apply(self, x: Tensor) -> Tensor:
        """The activation of x, element by element, in plain torch."""
        rest = (self.parameter,) if self.name in PARAMETERS else ()
        return _PLAIN[self.name](x, *rest)


ActivationLike = str | tuple[str, float] | Activation | None  # what `activation=` takes
