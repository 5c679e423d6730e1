"""The class of a fused block: a subclass of the block's own class with another forward."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .call_site import Site, rewrite, site_of, why_unfused
from .guards import Condition, Fresh, Read, is_mode, original_class, path_of
from .patterns import Match, writes_to
from .subclassing import Unannounced, subclass
from .tracing import Traced
from .values import Refusal

_classes: WeakValueDictionary[tuple[object, ...], type] = WeakValueDictionary()
# A class that pickles or copies itself in its own way might not know the fused class.
_COPYING = ("__reduce__", "__reduce_ex__", "__getstate__", "__deepcopy__", "__copy__")


@dataclass(frozen=True)
class Variant:
    """One traced forward of a block. It is valid while its guards hold."""

    source: str
    forward: Callable[..., Any] = field(compare=False)  # what torch.fx makes of the source
    parameters: tuple[str, ...]
    guards: tuple[Condition, ...]
    sites: tuple[Site, ...]

    def changed(self, block: nn.Module) -> str | None:
        """What has changed since the trace, so that the block cannot use this variant; None if nothing
        has."""
        lost = next((guard for guard in self.guards if not guard.holds(block)), None)
        if isinstance(lost, Read):
            return f"{lost.what}, which its block reads,"
        return None if lost is None else f"its block's {lost.what}"

    def of_mode(self, block: nn.Module) -> bool:
        """Whether the block is in the mode, training or eval, in which it was traced."""
        return all(guard.holds(block) for guard in self.guards if is_mode(guard))


def build(traced: Traced, matches: list[Match]) -> Variant:
    """Makes the function of a traced graph, with the matches rewritten. Lets the exception pass if that
    fails."""
    sites = tuple(map(site_of, matches))
    written = [str(m.residual.target) for m in matches if m.residual and writes_to(m.residual, m.add)]
    guards = (*traced.guards, *(Fresh(name, path_of(name)) for name in written))
    for match, site in zip(matches, sites, strict=True):
        rewrite(traced.graph, match, site)
    traced.graph.lint()
    code = traced.graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return Variant(code.src, scope["forward"], traced.parameters, guards, sites)


class FusedBlock(Unannounced):
    """The first base of a fused block's class. Instances have no new attributes, so state_dict, copies and
    replicas are those of the block. The class has the variants of its forward."""

    _bnfast_original: Any
    _bnfast_variants: tuple[Variant, ...]
    _bnfast_blank: Callable[[type], nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._bnfast_blank, (self._bnfast_original,), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        state = dict(self.__dict__)
        state.pop("_compiled_call_impl", None)  # it would call the block that is copied
        new.__dict__.update(copy.deepcopy(state, memo))
        return new

    def __prepare_scriptable__(self) -> nn.Module:
        """Gives torch.jit.script, which reads the source of forward, the original class."""
        plain: nn.Module = object.__new__(self._bnfast_original)
        plain.__dict__ = dict(self.__dict__)
        prepare: Callable[[], nn.Module] = getattr(plain, "__prepare_scriptable__", lambda: plain)
        return prepare()


def refuse_class(block: nn.Module) -> None:
    """Raises Refusal if the block's class cannot be replaced by a subclass."""
    cls = original_class(type(block))
    if any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in _COPYING):
        raise Refusal(f"{cls.__name__} is copied or pickled in a way of its own")
    if "forward" in block.__dict__:
        raise Refusal(f"the forward of this {cls.__name__} is its own")


def install(block: nn.Module, variants: tuple[Variant, ...], blank: Callable[[type], nn.Module]) -> None:
    """Gives a block a class whose forward runs the first variant that is valid. Blocks with the same variants
    share the class. blank: makes, of the original class, what pickle fills with a block's state."""
    original: Any = type(block)
    # repr: guards with 1, 1.0 and True compare equal, but expect different values.
    key = original, original.forward, variants, repr([variant.guards for variant in variants])
    made = _classes.get(key)
    if made is None:
        members = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "forward": _forward(original, variants),
            "_bnfast_original": original,
            "_bnfast_variants": variants,
            "_bnfast_blank": staticmethod(blank),
        }
        made = _classes[key] = subclass(original, members, FusedBlock)
    object.__setattr__(block, "__class__", made)


def _forward(original: Any, variants: tuple[Variant, ...]) -> Callable[..., Any]:
    traced = original.forward
    count = len(variants[0].parameters)  # those that forward requires, the same for all variants
    ways = tuple((variant.forward, variant.guards) for variant in variants)

    @functools.wraps(traced)  # torch.fx reads the names of the parameters through it
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        expected = len(args) == count and not kwargs and _tensors(args)
        if expected and original.forward is traced and not torch.jit.is_tracing():
            for fused, guards in ways:
                if _hold(guards, self):
                    return fused(self, *args)
        return original.forward(self, *args, **kwargs)

    return forward


# These two run with every call, and all() is slower.
def _tensors(args: tuple[Any, ...]) -> bool:
    for a in args:  # noqa: SIM110
        if not isinstance(a, Tensor):
            return False
    return True


def _hold(guards: tuple[Condition, ...], block: nn.Module) -> bool:
    for guard in guards:  # noqa: SIM110
        if not guard.holds(block):
            return False
    return True


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every block its original class back, in place, and returns the model. Warns of blocks whose class
    other code has replaced since they were fused, and leaves them."""
    for name, module in model.named_modules():
        if "_bnfast_original" in vars(type(module)):
            object.__setattr__(module, "__class__", original_class(type(module)))
        if isinstance(module, FusedBlock):
            warnings.warn(
                f"{name or 'the model'} stays fused: its class has become {type(module)} since", stacklevel=2
            )
    return model


def live_sites(block: FusedBlock) -> tuple[list[Site], dict[str, str]]:
    """Returns the sites of a block that a call fuses, and for each layer of the other sites the reason why
    not."""
    cls: Any = type(block)
    variants = block._bnfast_variants
    if "forward" in block.__dict__ or cls._bnfast_original.forward is not cls.forward.__wrapped__:
        variant = variants[0]
        changed: str | None = "its block's forward"
    else:
        ranked = [(v.changed(block), not v.of_mode(block), v) for v in variants]
        changed, _, variant = min(ranked, key=lambda found: (found[0] is not None, found[1]))
    if changed is not None:
        return [], dict.fromkeys((site.norm for site in variant.sites), f"{changed} has changed")
    live, reasons = [], {}
    for site in variant.sites:
        norm, *modules = map(block.get_submodule, (site.norm, *site.modules))
        reason = why_unfused(site, norm, tuple(modules))
        if reason is None:
            live.append(site)
        else:
            reasons[site.norm] = reason
    return live, reasons
