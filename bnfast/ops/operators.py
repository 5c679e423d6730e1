"""The operators torch.ops.bnfast.*, which stand for kernels in graphs: torch.compile, make_fx and opcheck
look at graphs. A normalizer describes its own to `forward_operator` and `backward_operator`.

They have no autograd: a Function around bare operators costs half of what registered autograd costs. They
use private workspaces: torch.compile's CUDA graphs (reduce-overhead) keep everything allocated in their
warm-up in a pool, and a cached workspace must not live there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import elsewhere
from ..kernels import layouts
from ..kernels.epilogue import NO_EPILOGUE, Activation, Epilogue, empty_mask
from ..kernels.records import Buffers, Forward, Gradients, Wanted

# The last arguments of every forward and backward. relu_mask: whether to return relu's mask (see
# Epilogue.mask). kept: the residual or relu's mask.
_ACTIVATION = 'str activation="none", float parameter=0.0'
_FORWARD = f"bool keep, {_ACTIVATION}, Tensor? residual=None, bool relu_mask=False"
_WANTED = "bool need_dx, ScalarType? weight_dtype, ScalarType? bias_dtype"
_BACKWARD = f"{_WANTED}, {_ACTIVATION}, Tensor? kept=None"
_library = torch.library.Library("bnfast", "DEF")


class Layout(NamedTuple):
    """The memory formats and shapes of a normalizer's results.

    ordered(x): x in a memory order that the kernels take. y_like(x), dx_like(x): empty tensors for results.
    parameters(x, options): the shape of weight and bias. has_dresidual(epilogue): whether a backward
    returns a gradient of the residual. masks: whether a forward returns relu's mask."""

    ordered: Callable[[Tensor], Tensor]
    y_like: Callable[[Tensor], Tensor]
    dx_like: Callable[[Tensor], Tensor] = layouts.out_like
    parameters: Callable[[Tensor, Any], Any] = lambda x, options: x.shape[1]
    has_dresidual: Callable[[Epilogue], bool] = lambda epilogue: epilogue.residual is not None
    masks: bool = True


class Packing(NamedTuple):
    """How a normalizer's options appear in a schema: the arguments' declaration, pack(x, *arguments) ->
    options, and unpack(options) -> arguments."""

    schema: str
    pack: Callable[..., Any]
    unpack: Callable[[Any], tuple[Any, ...]]

    def split(self, x: Tensor, given: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """(options, the arguments after them)."""
        count = self.schema.count(",") + 1
        return self.pack(x, *given[:count]), given[count:]


def forward_operator(
    name: str, kernel: Callable[..., Forward], layout: Layout, packing: Packing,
    stats_shape: Callable[[Tensor, Any, bool], tuple[Any, ...]], buffers: str = "",
) -> Callable[..., Forward]:  # fmt: skip
    """Defines bnfast::name(x, weight, bias, *buffers, *options, keep, *epilogue) for a kernel's forward, and
    returns it with the kernel's signature. stats_shape(x, options, keep): the shape of stats. buffers: their
    declaration."""
    count = buffers.count(",") + 1 if buffers else 0

    def arguments(x: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Any, ...]:
        held, (options, (keep, *after)) = rest[:count], packing.split(x, rest[count:])
        return weight, bias, (*held, *(None,) * (3 - count)), options, _epilogue(*after), keep

    def real(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        y, stats, mask = kernel(layout.ordered(x), *arguments(x, *rest), True)
        stats = stats if stats.numel() else stats.new_empty(0)  # which may be one tensor for all calls
        return y, stats, y.new_empty(0, dtype=torch.uint8) if mask is None else mask

    def fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *_, options, epilogue, keep = arguments(x, *rest)
        y = layout.y_like(x)
        stats = x.new_empty(stats_shape(x, options, keep), dtype=layouts.accumulator(x))
        masked = layout.masks and epilogue.mask and epilogue.residual is not None
        return y, stats, empty_mask(y) if masked else y.new_empty(0, dtype=torch.uint8)

    more = "".join(f"{part}, " for part in (buffers, packing.schema) if part)
    schema = f"{name}(Tensor x, Tensor? weight, Tensor? bias, {more}{_FORWARD}) -> (Tensor, Tensor, Tensor)"
    operator = _define(schema, real, fake)

    def call(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, held: Buffers, options: Any,
        epilogue: Epilogue, keep: bool,
    ) -> Forward:  # fmt: skip
        after = (*epilogue.activation, epilogue.residual, epilogue.mask)
        y, stats, mask = operator(x, weight, bias, *held[:count], *packing.unpack(options), keep, *after)
        return y, stats, mask if mask.numel() else None

    return call


def backward_operator(
    name: str, kernel: Callable[..., Gradients], layout: Layout, packing: Packing
) -> Callable[..., Gradients]:
    """Defines bnfast::name(x, dy, stats, weight, bias, *options, *wanted, *epilogue) for a kernel's backward,
    and returns it with the kernel's signature. Empty tensors stand for None, which an operator cannot
    return."""

    def arguments(x: Tensor, rest: tuple[Any, ...]) -> tuple[Any, Wanted, Epilogue]:
        options, after = packing.split(x, rest)
        return options, Wanted(*after[:3]), _epilogue(*after[3:])

    def real(x: Tensor, dy: Tensor, stats: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
        made = kernel(x, dy, stats, weight, bias, *arguments(x, rest), True)
        return tuple(x.new_empty(0) if t is None else t for t in made)

    def fake(x: Tensor, dy: Tensor, stats: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
        options, wanted, epilogue = arguments(x, rest)
        dx, shape = layout.dx_like(x), layout.parameters(x, options)
        return (
            dx if wanted.dx else dx.new_empty(0),
            dx.new_empty(0) if wanted.weight is None else dx.new_empty(shape, dtype=wanted.weight),
            dx.new_empty(0) if wanted.bias is None else dx.new_empty(shape, dtype=wanted.bias),
            torch.empty_like(dx) if layout.has_dresidual(epilogue) else dx.new_empty(0),
        )

    schema = (
        f"{name}(Tensor x, Tensor dy, Tensor stats, Tensor? weight, Tensor? bias, {packing.schema}, "
        f"{_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    operator = _define(schema, real, fake)

    def call(
        x: Tensor, dy: Tensor, stats: Tensor, weight: Any, bias: Any, options: Any, wanted: Wanted,
        epilogue: Epilogue,
    ) -> Gradients:  # fmt: skip
        after = (*epilogue.activation, epilogue.residual)
        found: Gradients = operator(x, dy, stats, weight, bias, *packing.unpack(options), *wanted, *after)
        return found

    return call


def _define(schema: str, real: Any, fake: Any) -> Any:
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


def _epilogue(
    activation: str = "none", parameter: float = 0.0, residual: Tensor | None = None, relu_mask: bool = False
) -> Epilogue:
    if activation == "none" and residual is None:
        return NO_EPILOGUE
    return Epilogue(Activation(activation, parameter), residual, relu_mask)
