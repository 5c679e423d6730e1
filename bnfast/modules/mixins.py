"""What every layer adds to torch.nn's: an activation, a residual, and the methods that let it stand in for
torch.nn's layer where torch.fx and torch.jit.script record graphs."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError

from ..importing import catch_up
from ..kernels.epilogue import Activation

_P = ParamSpec("_P")
WHEN_SUBCLASSED: list[Callable[[type], None]] = []  # each is called with every new class of layers


class NormMixin(nn.Module):
    """A mixin that precedes one of torch.nn's layers among the bases of a class. The class defines
    `normalize`."""

    activation = None  # type: Activation | None  # torch.jit.script would read an annotation

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        catch_up()
        for enter in WHEN_SUBCLASSED:
            enter(cls)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Computes activation(norm(input) + residual).

        Args:
            input (Tensor): The tensor to normalize, of a shape that the class explains.
            residual (Tensor, optional): A tensor to add before the activation, of input's shape, dtype and
                device.

        Returns:
            A tensor of input's shape, dtype and memory format."""
        if isinstance(input, Proxy):
            return self._leaf(*((input,) if residual is None else (input, residual)))
        return self.normalize(input, self.activation, residual)

    def normalize(self, input: Tensor, activation: Activation | None, residual: Tensor | None) -> Tensor:
        """Computes the forward with this activation in place of the layer's own."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        if self.activation is None:
            return super().extra_repr()
        shown = tuple(self.activation) if self.activation.parameter else self.activation.name
        return f"{super().extra_repr()}, activation={shown}"

    def _leaf(self, *inputs: Any) -> Any:
        """Records a call of this layer, as torch.fx does for torch.nn's layers. It does so from within the
        call, so it refuses hooks and other forwards around this one: they would be recorded a second time,
        beside the call that runs them."""
        tracer: Any = inputs[0].tracer
        around = "hooks" if self._forward_hooks or self._forward_pre_hooks else None
        if not is_ours(next(c for c in type(self).__mro__ if "forward" in vars(c))):
            around = "a forward of its own"
        if around or tracer.root is self:
            raise TraceError(
                f"{type(self).__name__} cannot be traced {f'with {around}' if around else 'by itself'}: "
                "pass a Tracer whose is_leaf_module returns True for it"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(self), inputs, {})

    def __prepare_scriptable__(self) -> nn.Module:
        """Gives torch.jit.script torch.nn's layer, with the same parameters and buffers: it compiles a part
        of Python only, and the kernels' host code uses more. A subclass has to provide its own."""
        if not is_ours(type(self)):
            return self
        if self.activation is not None:
            raise RuntimeError(
                f"torch.jit.script has torch.nn's layer for {type(self).__name__}, which has no activation: "
                "apply it in a module of its own, or use torch.export"
            )
        plain = next(
            c for c in type(self).__mro__ if issubclass(c, nn.Module) and not issubclass(c, NormMixin)
        )
        module: nn.Module = object.__new__(plain)
        module.__dict__ = dict(self.__dict__)
        return module


def says_what_it_takes(init: Callable[_P, None]) -> Callable[_P, None]:
    """Wraps a layer's __init__ so that its TypeErrors about arguments name the layer, and not the private
    class that has the __init__, and suggest the argument that may have been meant."""
    takes = signature(init)
    names = [*takes.parameters][1:]

    @wraps(init)
    def explained(*args: _P.args, **kwargs: _P.kwargs) -> None:
        catch_up()
        try:
            takes.bind(*args, **kwargs)
        except TypeError as wrong:
            layer = next(c.__name__ for c in type(args[0]).__mro__ if is_ours(c))
            help, unknown = "", next((name.lower() for name in kwargs if name not in names), None)
            if unknown is not None:
                begin = unknown.partition("_")[0]
                near = get_close_matches(unknown, names, 1) or [n for n in names if n.startswith(begin)]
                help = f": did you mean {near[0]!r}?" if near else f": it takes {', '.join(names)}"
            raise TypeError(f"{layer}() {wrong}{help}") from None
        init(*args, **kwargs)

    return explained


class BiasMixin:
    """Adds `bias=False`, which torch's layers have had since 2.13. Before, a layer without a bias is one
    whose bias has been removed."""

    def _without_bias(self: Any, unless: bool) -> None:
        if self.weight is not None and not unless:
            self.register_parameter("bias", None)

    def reset_parameters(self: Any) -> None:
        if hasattr(self, "reset_running_stats"):
            self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def is_ours(cls: type) -> bool:
    """Whether a class is one of bnfast's own layers, and not a subclass defined elsewhere."""
    return cls.__module__.rpartition(".")[0] == __package__
