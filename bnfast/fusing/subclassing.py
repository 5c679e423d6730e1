"""Makes subclasses of classes without a call of their __init_subclass__ or metaclass."""

from __future__ import annotations

from typing import Any

from torch import nn


class Unannounced(nn.Module):  # a Module, for an object's class can only change to one of the same layout
    """The first base of a class. It keeps the __init_subclass__ of the other bases from running: they may
    keep a register of models, or refuse classes that they do not know."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def subclass(cls: type, members: dict[str, Any], mixin: type = Unannounced) -> Any:
    """Makes a subclass of the same name with `mixin` (Unannounced, or a subclass) as its first base. Its
    metaclass is the same, but the metaclass's own __new__ and __init__ do not run either."""
    bases = (cls,) if issubclass(cls, mixin) else (mixin, cls)
    return type.__new__(type(cls), cls.__name__, bases, members)
