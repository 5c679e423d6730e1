"""A reduction that stops at the moments, which the caller merges with those of others before anything is
normalized. stats is [3, channels]: mean, M2 and count."""

import triton
import triton.language as tl

from . import batch_norm
from .common import Normalizer


@triton.jit
def finalize_forward(c, m, ws, params, options, g, T: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    tl.store(ws.stats_ptr + c.offs, m.pivot + m.shift, mask=c.mask)
    tl.store(ws.stats_ptr + g.channels + c.offs, m.m2, mask=c.mask)
    tl.store(ws.stats_ptr + 2 * g.channels + c.offs, m.count, mask=c.mask)


MOMENTS = Normalizer(
    finalize_forward, batch_norm.coefficients, batch_norm.finalize_backward, batch_norm.dx_coefficients
)
