"""The operators that stand for kernels in graphs, torch.ops.bnfast.*: for everything that looks at graphs,
as torch.compile, make_fx and opcheck do.

They hold no autograd: a Function around bare operators costs half of what registered autograd costs. Their
workspaces are their own: torch.compile's CUDA graphs (reduce-overhead) keep all that is allocated in their
warm-up in a pool, which a cached workspace must not live in.

What implements an operator packs the arguments of its schema in its first line: each ends with those of
FORWARD or BACKWARD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import elsewhere
from ..kernels import layouts, views
from ..kernels.epilogue import NO_EPILOGUE, Activation, Epilogue
from ..kernels.records import Wanted

# of every operator, after its own arguments. signs: whether to return relu's mask, see Epilogue.mask
FORWARD = 'str activation="none", float parameter=0.0, Tensor? residual=None, bool signs=False'
# kept: the residual, or relu's mask
BACKWARD = 'str activation="none", float parameter=0.0, Tensor? kept=None'
WANTED = "bool need_dx, ScalarType? weight_dtype, ScalarType? bias_dtype"
_library = torch.library.Library("bnfast", "DEF")


def define(schema: str, real: Any, fake: Any) -> Any:
    """Registers an operator for CPU (the interpreter) and CUDA; returns it."""

    def on_its_device(x: Tensor, *rest: Any) -> Any:
        if elsewhere(x):
            with torch.cuda.device(x.device):
                return real(x, *rest)
        return real(x, *rest)

    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, on_its_device, key)
    torch.library.register_fake(f"bnfast::{name}", fake, lib=_library)
    return getattr(torch.ops.bnfast, name).default


def packed(
    activation: str = "none", parameter: float = 0.0, residual: Tensor | None = None, signs: bool = False
) -> Epilogue:
    """The Epilogue that FORWARD's or BACKWARD's arguments make."""
    if activation == "none" and residual is None:
        return NO_EPILOGUE
    return Epilogue(Activation(activation, parameter), residual, signs)


def flat(epilogue: Epilogue) -> tuple[Any, ...]:
    """FORWARD's arguments."""
    return *epilogue.activation, epilogue.residual, epilogue.mask


def present(x: Tensor, made: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """An operator cannot return None."""
    return tuple(x.new_empty(0) if t is None else t for t in made)


def with_mask(made: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    y, table, mask = made
    return y, table, y.new_empty(0, dtype=torch.uint8) if mask is None else mask


def without_mask(made: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an operator returns, in which an empty tensor stands for no mask."""
    y, table, mask = made
    return y, table, mask if mask.numel() else None


def mask_like(y: Tensor, epilogue: Epilogue) -> Tensor:
    """As Epilogue.in_forward decides it, which is given x in y's order."""
    c, s = y.shape[1], 1
    for size in y.shape[2:]:
        s = s * size
    last = layouts.is_channels_last(y)
    there = epilogue.mask and epilogue.residual is not None and views.packs(c, s, y.element_size(), last)
    return y.new_empty(y.numel() // 8 if there else 0, dtype=torch.uint8)


def gradients_like(dx: Tensor, shape: Any, wanted: Wanted, residual: bool) -> tuple[Tensor, ...]:
    """Of x (dx: an empty tensor like it), of parameters of this shape, and of the residual."""
    return (
        dx if wanted.dx else dx.new_empty(0),
        dx.new_empty(0) if wanted.weight is None else dx.new_empty(shape, dtype=wanted.weight),
        dx.new_empty(0) if wanted.bias is None else dx.new_empty(shape, dtype=wanted.bias),
        torch.empty_like(dx) if residual else dx.new_empty(0),
    )
