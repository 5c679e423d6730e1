"""What the operators have in common: act(norm(x) + residual), and empty tensors for what there is none of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import layouts, views
from ..kernels.epilogue import NO_EPILOGUE, Activation, Epilogue

# of every operator, after its own arguments. signs: whether to return them, see Epilogue.mask
FORWARD = 'str activation="none", float parameter=0.0, Tensor? residual=None, bool signs=False'
# kept: the residual, or the signs
BACKWARD = 'str activation="none", float parameter=0.0, Tensor? kept=None'
_library = torch.library.Library("bnfast", "DEF")


def define(schema: str, real: Any, fake: Any) -> Any:
    """Registers an operator for CPU (the interpreter) and CUDA; returns it."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, real, key)
    torch.library.register_fake(f"bnfast::{name}", fake, lib=_library)
    return getattr(torch.ops.bnfast, name).default


def epilogue(activation: str, parameter: float, residual: Tensor | None, signs: bool = False) -> Epilogue:
    if activation == "none" and residual is None:
        return NO_EPILOGUE
    return Epilogue(Activation(activation, parameter), residual, signs)


def present(x: Tensor, made: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """An operator cannot return None."""
    return tuple(x.new_empty(0) if t is None else t for t in made)


def with_signs(made: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    y, table, signs = made
    return y, table, y.new_empty(0, dtype=torch.uint8) if signs is None else signs


def signs_like(y: Tensor, residual: Tensor | None, signs: bool) -> Tensor:
    """As Epilogue.in_forward decides it, which is given x in y's order."""
    c, s = y.shape[1], 1
    for size in y.shape[2:]:
        s = s * size
    last = layouts.is_channels_last(y)
    there = signs and residual is not None and views.packs(c, s, y.element_size(), last)
    return y.new_empty(y.numel() // 8 if there else 0, dtype=torch.uint8)


def gradients_like(
    dx: Tensor, shape: Any, need_dx: bool, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None,
    residual: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of x (dx: an empty tensor like it), of parameters of this shape, and of the residual."""
    return (
        dx if need_dx else dx.new_empty(0),
        dx.new_empty(0) if weight_dtype is None else dx.new_empty(shape, dtype=weight_dtype),
        dx.new_empty(0) if bias_dtype is None else dx.new_empty(shape, dtype=bias_dtype),
        torch.empty_like(dx) if residual else dx.new_empty(0),
    )
