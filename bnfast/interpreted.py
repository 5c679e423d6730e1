"""Changes Triton's interpreter for tests. It then rounds to bf16 as the hardware does (unchanged, it
truncates fp32 to bf16 and mishandles subnormals), sums in a tree, takes half the time, and runs every kernel
with every numpy."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Within, interpreted kernels round as a GPU does, and take about half the time."""
    builder = interpreter.interpreter_builder
    convert, splat = interpreter._convert_float, builder.create_splat
    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor

    def convert_float(value, source, target, rounding_mode):  # type: ignore[no-untyped-def]
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.array(value, np.float32)).bfloat16().view(torch.uint16).numpy()
        if source == tl.bfloat16 and target == tl.float32:
            return (np.asarray(value).astype(np.uint32) << 16).view(np.float32)
        return convert(value, source, target, rounding_mode)

    # A function that a kernel calls does not patch triton.language again, which the kernel's launch has
    # patched.
    def patch_lang(function: Callable[..., Any]) -> Any:
        seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if seen and not any(tl.core.is_builtin(language.load) for language in seen):
            return interpreter._LangPatchScope()  # nothing replaced, so nothing to restore
        return patch(function)

    # A scalar becomes a Python int whatever the dimensions of the array that holds it. Triton 3.6 leaves the
    # conversion to numpy, which since 2.4 refuses arrays of one dimension or more.
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    # A comparison of scalars stays boolean where it is broadcast, so that it can be part of a mask. Triton
    # converts it to integers, which the loads and stores of 3.9 refuse.
    def create_splat(shape: Any, scalar: Any) -> Any:
        made = splat(shape, scalar)
        if scalar.data.dtype == np.bool_:
            made.data = made.data.astype(np.bool_)
        return made

    # numpy adds what it reduces in pairs only along the last axis, and one after the other along any other.
    # A GPU adds in a tree along each.
    def tree_sum(self: Any, input: Any) -> Any:
        values, axis = input.handle.data, self.axis
        last = values.reshape(-1) if axis is None else np.ascontiguousarray(np.moveaxis(values, axis, -1))
        total = np.sum(last, axis=-1)
        if self.keep_dims:
            total = total.reshape((1,) * values.ndim) if axis is None else np.expand_dims(total, axis)
        return self.to_tensor(total, input.dtype)

    # 32-bit arithmetic is not repeated in 64 bits to detect an overflow, which tensors small enough for the
    # interpreter cannot reach.
    quick = dataclasses.replace(builder.options, sanitize_overflow=False)
    with (
        mock.patch.object(interpreter, "_convert_float", convert_float),
        mock.patch.object(interpreter, "_patch_lang", patch_lang),
        mock.patch.object(interpreter, "_patch_lang_tensor", patch_lang_tensor),
        mock.patch.object(interpreter.ReduceOps, "sum", tree_sum),
        mock.patch.multiple(builder, create_splat=create_splat, options=quick),
    ):
        yield
