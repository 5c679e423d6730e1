"""What a layer does to what it has normalized, in the same kernels: act(norm(x) + z). Host side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layouts import dense_like, is_channels_last
from .views import packs

# of x, gamma, beta and the residual
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class Fused(NamedTuple):
    """name, parameter: of the activation, see activations.py. z: the residual, of x's shape and dtype, or
    None. signs: whether relu's backward may have a bit for each element to go by, rather than z.
    To a backward, z is what the forward kept: the residual or these bits."""

    name: str = "none"
    parameter: float = 0.0
    z: Tensor | None = None
    signs: bool = False

    def residual(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Forward: z in x's order, and room for the signs, where there are to be any."""
        if self.z is None:
            return None, None
        s = x.numel() // max(1, x.shape[0] * x.shape[1])
        signs = None
        if self.signs and packs(x.shape[1], s, x.element_size(), is_channels_last(x)):
            signs = torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)
        return dense_like(self.z, x), signs

    def kept(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Backward: z in x's order or the signs, whichever the forward kept."""
        if self.z is None:
            return None, None
        return (None, self.z.contiguous()) if self.z.dtype == torch.uint8 else (dense_like(self.z, x), None)


NOTHING = Fused()
NO_ACTIVATION = {"NAME": NOTHING.name, "PARAMETER": NOTHING.parameter}  # compile-time constants of kernels
