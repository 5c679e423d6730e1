"""Subclasses of classes that may want to know of their subclasses."""

from __future__ import annotations

from typing import Any

from torch import nn


class Unannounced(nn.Module):  # a Module, for an object's class can only change to one of the same layout
    """First base of a class whose other bases do not hear of it: they may keep a register of models, or
    refuse what they do not know."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def subclass(cls: type, members: dict[str, Any], mixin: type = Unannounced) -> Any:
    """A subclass of the same name, with `mixin` (Unannounced, or a subclass) before it. Its metaclass is the
    same, but does not hear of it either."""
    bases = (cls,) if issubclass(cls, mixin) else (mixin, cls)
    return type.__new__(type(cls), cls.__name__, bases, members)
