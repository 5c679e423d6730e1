"""The interpreter's bf16, made what the hardware's is: it truncates fp32 to bf16 and mangles subnormals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits, to nearest even, NaN kept."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


@contextlib.contextmanager
def bfloat16_to_nearest() -> Iterator[None]:
    """Within, interpreted kernels convert to bf16 as a GPU does."""
    original = interpreter._convert_float

    def convert(value, source, target, rounding_mode):  # type: ignore[no-untyped-def]
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(value)
        if source == tl.bfloat16 and target == tl.float32:
            return from_bfloat16(value)
        return original(value, source, target, rounding_mode)

    with mock.patch.object(interpreter, "_convert_float", convert):
        yield
